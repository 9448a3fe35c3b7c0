"""customize evaluate end to end: tiny models, images and result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file

from customize.concepts.io.write_concept import save_concept
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import AttributeJudge, IdentityJudge, Judges
from scripts.storybook_training.train_judges import save_judges
from tests.cli.making import Run, World, photos, refused
from tests.evaluation.making import save_blip, save_blip2, save_clip, save_dino
from tests.pipeline.making import concept
from tests.tiny import tiny_sd, tiny_sd3

RATES = ("identity", "prompt", "composition", "leak", "drift")


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base for 64 x 64 pixels, untrained judges, two concepts and their reference images."""
    root = tmp_path_factory.mktemp("judged")
    torch.manual_seed(0)
    parts = tiny_sd().components
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
    }
    parts["vae"] = AutoencoderKL.from_config({**parts["vae"].config, **levels})
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(root / "base")
    for index, (name, kind) in enumerate((("rex", "dog"), ("tom", "cat"))):
        save_concept(concept(pipe, name, index=index, class_word=kind), root / name)
        bundled_concept(name).write(root / "references" / name)
    judges = Judges(AttributeJudge().eval(), IdentityJudge().eval(), 0.9)
    save_judges(judges, root / "judges", {})
    return root


def storybook(root: Path) -> list[str]:
    return [
        *("--storybook", "--base", str(root / "base"), "--judges", str(root / "judges")),
        *("--references", str(root / "references"), "--steps", "1", "--device", "cpu"),
    ]


def test_storybook_rates(run: Run, judged: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sources = (judged / "rex", judged / "tom")
    result = run("evaluate", *sources, *storybook(judged), "--seeds", "2", "--json", file)
    assert (result.code, result.err) == (0, "")
    assert "all 2" in result.out and "±" in result.out and "over 2 seeds" in result.out
    report = json.loads(file.read_text())
    rows = report["rows"]
    assert [(row["concept"], row["attached"], row["seed"]) for row in rows] == [
        *(("rex", 1, 1), ("rex", 1, 2), ("tom", 1, 1), ("tom", 1, 2)),
        *(("rex", 2, 1), ("tom", 2, 1), ("rex", 2, 2), ("tom", 2, 2)),
    ]
    for row in rows:
        assert all(0 <= row[rate] <= 1 for rate in RATES)
        assert row["drift"] > 0
    alone = [row["drift"] for row in rows if row["attached"] == 1]
    assert report["figures"]["drift_alone"] == pytest.approx(sum(alone) / 4)
    assert set(report["figures"]) >= {"identity_alone", "identity_merged", "leak_merged"}
    assert report["figures"]["composition_merged"] == pytest.approx(
        sum(row["composition"] for row in rows[4:]) / 4
    )
    again = tmp_path / "again.json"
    flags = ("--seeds", "1", "--json", again)
    assert run("evaluate", sources[0], *storybook(judged), *flags).code == 0
    single = json.loads(again.read_text())
    assert "identity_merged" not in single["figures"]
    assert single["rows"] == rows[:1]  # the same images, whichever concepts are scored


def test_a_merge_scores_like_its_concepts_together(run: Run, judged: Path, tmp_path: Path) -> None:
    flags = (*storybook(judged), "--seeds", "1", "--merge", "sum")
    sources = (judged / "rex", judged / "tom")
    assert run("evaluate", *sources, *flags, "--json", tmp_path / "both.json").code == 0
    assert run("merge", *sources, "--merge", "sum", "--output", tmp_path / "duo").code == 0
    result = run("evaluate", tmp_path / "duo", *flags, "--json", tmp_path / "duo.json")
    assert (result.code, result.err) == (0, ""), result
    apart, whole = (
        json.loads((tmp_path / name).read_text())["rows"] for name in ("both.json", "duo.json")
    )
    together = [row for row in apart if row["attached"] == 2]
    assert [row["concept"] for row in whole] == ["rex", "tom"]
    for one, other in zip(whole, together, strict=True):
        for key, value in other.items():
            assert one[key] == (pytest.approx(value, abs=1e-3) if key == "drift" else value), key


def test_weights_apply_to_the_merge(run: Run, judged: Path, tmp_path: Path) -> None:
    sources = (judged / "rex", judged / "tom")
    drifts = []
    for weights in ("1,0", "1,1"):
        file = tmp_path / f"{weights}.json"
        flags = ("--weights", weights, "--seeds", "1", "--json", file)
        assert run("evaluate", *sources, *storybook(judged), *flags).code == 0
        rows = json.loads(file.read_text())["rows"]
        drifts.append([row["drift"] for row in rows])
    # rex, tom, both, both: with tom's weight 0, only rex causes drift.
    assert drifts[0][2] == pytest.approx(drifts[0][0], rel=1e-3)
    assert drifts[1][2] != pytest.approx(drifts[1][0], rel=1e-3)


def test_invalid_storybook_input(run: Run, judged: Path, tmp_path: Path) -> None:
    flags = storybook(judged)
    refused(run("evaluate", *flags), "no concept is given")
    refused(run("evaluate", judged / "rex", judged / "rex", *flags), "two concepts are called rex")
    refused(run("evaluate", judged / "rex", *flags, "--judges", tmp_path), "judges cannot be read")
    refused(run("evaluate", judged / "rex", *flags, "--references", tmp_path), "no images")
    refused(run("evaluate", judged / "rex", *flags, "--steps", "5000"), "1000 timesteps")
    refused(run("evaluate", judged / "rex", *flags, "--seeds", "9" * 23), "--seeds", "1000")
    refused(run("evaluate", judged / "rex", *flags, "--clip", "x"), "--clip has no effect with")
    refused(run("evaluate", judged / "rex", *flags, "--blip2", "x"), "--blip2 has no effect with")
    result = run("evaluate", judged / "rex", *flags, "--json", tmp_path)
    refused(result, "the path is a folder", str(tmp_path))
    (tmp_path / "file").write_text("")
    result = run("evaluate", judged / "rex", *flags, "--json", tmp_path / "file" / "x.json")
    refused(result, "cannot be written", str(tmp_path / "file"))
    tensors = {f"unet.conv_in.lora_{end}.weight": torch.ones(2, 2) for end in "AB"}
    save_file(tensors, tmp_path / "ink.safetensors")
    refused(
        run("evaluate", tmp_path / "ink.safetensors", *flags),
        *("a LoRA has neither", "customize evaluate --images", "ink.safetensors"),
    )
    save_concept(concept(tiny_sd(), "sofa", class_word="sofa"), tmp_path / "sofa")
    refused(run("evaluate", tmp_path / "sofa", *flags), "sofa has the class word sofa", "dog, cat")


def test_incompatible_bases_and_concepts_are_refused_before_drawing(
    run: Run, judged: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are reported before images are generated."""
    monkeypatch.setattr("customize.cli.storybook_evaluation.storybook_rows", None)
    flags = storybook(judged)
    result = run("evaluate", judged / "rex", *flags, "--base", world.base)
    refused(result, "generates 32 x 32 pixels", "64 x 64", world.base)
    pipe = tiny_sd3()
    save_concept(concept(pipe, "rex", class_word="dog"), tmp_path / "rex")
    refused(run("evaluate", tmp_path / "rex", *flags), "rex was learned on sd3")


def test_images_that_are_not_finite_are_not_scored(run: Run, judged: Path) -> None:
    sources = (judged / "rex", judged / "tom")
    flags = ("--seeds", "1", "--weights", "1e38,1e38")
    refused(run("evaluate", *sources, *storybook(judged), *flags), "is not finite")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return save_clip(root / "clip"), save_dino(root / "dino")


@pytest.fixture(scope="session")
def blips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("blips")
    return save_blip(root / "blip"), save_blip2(root / "blip2")


def test_clip_and_dino(run: Run, world: World, models: tuple[Path, Path], tmp_path: Path) -> None:
    """Images of generate have prompts and class words in their JSON files."""
    pictures, file = tmp_path / "pictures", tmp_path / "figures.json"
    made = ("--base", world.base, "--steps", "1", "--count", "2", "--output", pictures)
    assert run("generate", world.rex, *made, "--prompt", "a photo of <rex>").code == 0
    references = photos(tmp_path / "photos")
    flags = ("--clip", models[0], "--dino", models[1], "--device", "cpu", "--json", file)
    result = run("evaluate", "--images", pictures, "--references", references, *flags)
    assert result.code == 0, result.err
    for name in ("CLIP-T", "CLIP-I", "DINO-I"):
        assert name in result.out
    report = json.loads(file.read_text())
    assert [row["prompt"] for row in report["rows"]] == ["a photo of dog"] * 2
    assert set(report["figures"]) == {"clip_t", "clip_i", "dino_i"}

    from customize.evaluation.clip import ClipScorer
    from customize.training.data.dataset import read_image

    images = [read_image(path) for path in sorted(pictures.glob("*.png"))]
    expected = ClipScorer(models[0]).clip_t(images, ["a photo of dog"] * 2)
    torch.testing.assert_close(torch.tensor([r["clip_t"] for r in report["rows"]]), expected)


def test_blip(run: Run, blips: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither references nor a CLIP model are needed."""
    from customize.evaluation.blip import Blip2Scorer, BlipScorer
    from customize.training.data.dataset import read_image

    pictures, file = photos(tmp_path / "photos", 3), tmp_path / "figures.json"
    images = ("--images", pictures, "--device", "cpu", "--json", file)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\na red cup\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    result = run("evaluate", *images, *prompts, "--blip", blips[0], "--blip2", blips[1])
    assert result.code == 0, result.err
    for name in ("BLIP ITC", "BLIP ITM", "BLIP-2 ITC", "BLIP-2 ITM"):
        assert name in result.out
    report = json.loads(file.read_text())
    actual = [read_image(path) for path in sorted(pictures.glob("*.png"))]
    texts = ["a dog", "a cat", "a red cup"]
    expected = BlipScorer(blips[0]).scores(actual, texts) | Blip2Scorer(blips[1]).scores(
        actual, texts
    )
    assert set(report["figures"]) == set(expected)
    for name, values in expected.items():
        rows = torch.tensor([row[name] for row in report["rows"]])
        torch.testing.assert_close(rows, values)
        assert report["figures"][name] == pytest.approx(values.mean().item())
    flags = ("--blip2", blips[1])
    assert run("evaluate", *images, *prompts, *flags).code == 0
    assert set(json.loads(file.read_text())["figures"]) == {"blip2_itc", "blip2_itm"}
    refused(run("evaluate", *images, *flags), "BLIP needs prompts", "give --prompts")
    refused(run("evaluate", *images, *prompts, "--blip", blips[1]), "of type blip-2, not a BLIP")


def test_prompts_from_a_file(run: Run, models: tuple[Path, Path], tmp_path: Path) -> None:
    pictures, file = photos(tmp_path / "photos", 3), tmp_path / "figures.json"
    lines = tmp_path / "prompts.txt"
    flags = ("--images", pictures, "--prompts", lines, "--clip", models[0], "--json", file)
    lines.write_text("a photo of <rex>\n\n")
    refused(
        run("evaluate", *flags),
        "class word of <rex> in the prompt 'a photo of <rex>'",
        "--class-word",
    )
    assert run("evaluate", *flags, "--class-word", "dog").code == 0
    report = json.loads(file.read_text())
    assert [row["prompt"] for row in report["rows"]] == ["a photo of dog"] * 3
    assert set(report["figures"]) == {"clip_t"}
    lines.write_bytes(b"\xef\xbb\xbfa dog\n")
    assert run("evaluate", *flags).code == 0
    assert json.loads(file.read_text())["rows"][0]["prompt"] == "a dog"
    lines.write_text("a dog\na cat\n")
    refused(run("evaluate", *flags), "2 prompts for 3 images", str(lines))
    lines.write_text(" \n")
    refused(run("evaluate", *flags), "no prompts")
    lines.write_bytes(b"\xff\xfe")
    refused(run("evaluate", *flags), "not a text file")


def test_invalid_image_input(
    run: Run, world: World, models: tuple[Path, Path], tmp_path: Path
) -> None:
    pictures = photos(tmp_path / "photos")
    images = ("--images", pictures)
    refused(run("evaluate"), "--storybook", "--images")
    refused(run("evaluate", "--storybook", *images), "either --storybook or --images")
    refused(run("evaluate", *images), "no scoring model is given", "--blip2")
    refused(run("evaluate", world.rex, *images), "--images scores images")
    refused(run("evaluate", *images, "--dino", models[1]), "give --references")
    refused(run("evaluate", *images, "--clip", models[0]), "needs prompts or reference images")
    result = run("evaluate", *images, "--clip", "x", "--weights", "3,a", "--seeds", "2")
    refused(result, "--weights, --seeds has no effect with --images")
    (tmp_path / "file").write_text("")
    result = run("evaluate", *images, "--clip", "x", "--json", tmp_path / "file" / "x.json")
    refused(result, "cannot be written", str(tmp_path / "file"))
    flags = ("--references", pictures)
    refused(run("evaluate", *images, *flags, "--clip", models[1]), "of type dinov2, not a CLIP")
    refused(run("evaluate", *images, *flags, "--clip", tmp_path), "cannot be loaded")
    (tmp_path / "empty").mkdir()
    refused(run("evaluate", "--images", tmp_path / "empty", "--clip", "x"), "no images")
    (pictures / "0.json").write_text("{}")
    (pictures / "1.json").write_text("{}")
    refused(run("evaluate", *images, "--clip", models[0]), "settings cannot be read", "0.json")
