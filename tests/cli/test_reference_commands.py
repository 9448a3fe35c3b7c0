"""Reference images on the command line: generate, references encode, inspect."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from customize import References, inspect, load_custom
from customize.references.group import ReferenceGroup
from customize.storybook.bundled_assets import ASSETS
from tests.cli.making import Run, World, photos, refused
from tests.references.tiny_easyref import write_release
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import drawn, tiny_sd
from tests.tiny_llm import tiny_flux2_klein

PROMPT = "a dog on the beach"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("references") / "model"
    return str(tiny_reference_model(tiny_sd().components).save_pretrained(folder))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("references") / "photos", 3, side=64)


def arguments(world: World, output: Path) -> tuple[object, ...]:
    return (
        *("generate", "--base", world.base, "--prompt", PROMPT, "--steps", "2"),
        *("--device", "cpu", "--output", output),
    )


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_generate_equals_the_arguments_of_a_call(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    given = arguments(world, tmp_path / "out")
    flags = ("--references", pictures, "--reference-model", model)
    assert run(*given).code == run(*given, *flags).code == 0
    assert run(*given, *flags, "--reference-scale", "0.5").code == 0
    plain, full, half = (read(tmp_path / "out" / f"000{k}.png") for k in (1, 2, 3))
    pipe = load_custom(tiny_sd(), References.from_pretrained(model))
    for image, scale in ((full, 1.0), (half, 0.5)):
        assert (image != plain).any()
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        files = [pictures / f"{k}.png" for k in range(3)]
        result = pipe(PROMPT, reference_images=files, reference_scale=scale, **call)
        assert (image == np.asarray(result.images[0])).all()


def test_what_images_depend_on_is_recorded(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    given = arguments(world, tmp_path)
    files = ("--references", pictures / "0.png", "--references", pictures / "1.png")
    result = run(*given, *files, "--reference-model", model, "--count", "2")
    assert (result.code, result.err) == (0, "")
    assert run(*given).code == 0
    first, second, plain = (json.loads((tmp_path / f"000{k}.json").read_text()) for k in (1, 2, 3))
    assert plain["references"] is None is plain["reference_agreement"]
    assert first["references"] == second["references"]
    group = References.from_pretrained(model).encode([pictures / "0.png", pictures / "1.png"])
    assert first["references"] == {
        "images": [
            {"name": str(pictures / f"{k}.png"), "digest": group.digests[k]} for k in (0, 1)
        ],
        "scale": 1.0,
        "model": model,
        "model_digest": group.model,
    }
    assert first["reference_agreement"] == pytest.approx(group.agreement, abs=1e-4)


def test_words_of_the_prompt_have_their_own_groups(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    given = ("generate", "--base", world.base, "--prompt", "a dog and a cat", "--steps", "2")
    given += ("--device", "cpu", "--output", tmp_path, "--reference-model", model)
    first, second = pictures / "0.png", pictures / "1.png"
    boxes = ("--regions", "a dog=0,0,.5,1", "--regions", "a cat=.5,0,1,1")
    groups = ("--references", f"a dog={first}", "--references", f"a cat={second}")
    assert run(*given, *boxes, *groups).code == 0
    pipe = load_custom(tiny_sd(), References.from_pretrained(model))
    expected = pipe(
        "a dog and a cat",
        reference_images={"a dog": [first], "a cat": [second]},
        regions={"a dog": (0, 0, 0.5, 1), "a cat": (0.5, 0, 1, 1)},
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert (read(tmp_path / "0001.png") == np.asarray(expected)).all()
    record = json.loads((tmp_path / "0001.json").read_text())
    images = [(image["words"], image["name"]) for image in record["references"]["images"]]
    assert images == [("a dog", str(first)), ("a cat", str(second))]
    assert record["reference_agreement"] == [1.0, 1.0]
    refused(run(*given, "--references", f"a cow={first}"), "'a cow' is not in the prompt")
    refused(run(*given, *groups, "--references", first), "is for no words of the prompt")
    refused(run(*given, "--references", "a dog="), "invalid references 'a dog='")


def test_an_encoded_group_gives_the_images_of_its_pictures(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rex.refs.safetensors"
    result = run("references", "encode", pictures, "--reference-model", model, "-o", file)
    assert (result.code, result.err) == (0, "")
    assert "agreement" in result.out and "0.png" in result.out and f"Wrote {file}" in result.out
    assert len(ReferenceGroup.load(file)) == 3
    given = (*arguments(world, tmp_path / "out"), "--reference-model", model, "--references")
    assert run(*given, pictures).code == run(*given, file).code == 0
    assert (read(tmp_path / "out/0001.png") == read(tmp_path / "out/0002.png")).all()
    records = [json.loads((tmp_path / f"out/000{k}.json").read_text()) for k in (1, 2)]
    for record in records:  # the file has no folders
        for image in record["references"]["images"]:
            image["name"] = Path(image["name"]).name
    assert records[0]["references"] == records[1]["references"]


def test_a_base_that_reads_references_by_itself_needs_no_model(
    run: Run, pictures: Path, tmp_path: Path
) -> None:
    tiny_flux2_klein().save_pretrained(tmp_path / "base")
    given = ("--prompt", PROMPT, "--steps", "2", "--size", "32", "--device", "cpu")
    given += ("--base", tmp_path / "base", "--output", tmp_path / "out")
    assert run("generate", *given, "--references", pictures / "0.png").code == 0
    call = {"num_inference_steps": 2, "height": 32, "width": 32}
    call |= {"generator": torch.Generator().manual_seed(0), "output_type": "pil"}
    with Image.open(pictures / "0.png") as image:
        expected = drawn(tiny_flux2_klein(), PROMPT, image=[image.convert("RGB")], **call)[0]
    assert (read(tmp_path / "out/0001.png") == np.asarray(expected)).all()
    record = json.loads((tmp_path / "out/0001.json").read_text())["references"]
    assert record["model"] is record["model_digest"] is None and len(record["images"]) == 1


def test_the_bundled_model_is_named_without_its_folder(run: Run, tmp_path: Path) -> None:
    given = ("generate", "--base", "assets/storybook", "--prompt", "a photo of a dog")
    given += ("--references", "assets/concepts/rex/0.png", "--steps", "1", "--device", "cpu")
    assert run(*given, "--output", tmp_path).code == 0
    text = (tmp_path / "0001.json").read_text()
    assert str(ASSETS.parent) not in text
    record = json.loads(text)["references"]
    digest = References.from_pretrained("assets/references").model.digest
    assert (record["model"], record["model_digest"]) == ("bundled", digest)


def test_easyrefs_file_is_read_with_the_folder_of_its_mllm(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, weights, mllm = write_release(tmp_path, monkeypatch)
    pipe.save_pretrained(tmp_path / "base")
    file = tmp_path / "rex.refs.safetensors"
    encode = ("references", "encode", pictures, "--prompt", PROMPT, "-o", file)
    refused(run(*encode, "--reference-model", weights), "easyref.safetensors", "Fix: add --mllm")
    refused(run(*encode, "--mllm", mllm), "belongs to EasyRef's .safetensors file")
    source = ("--reference-model", weights, "--mllm", mllm)
    assert run(*encode, *source).code == 0
    given = ("generate", "--base", tmp_path / "base", "--prompt", PROMPT, "--steps", "2")
    given += ("--device", "cpu", "--size", "32", "--output", tmp_path / "out")
    refused(run(*given, "--mllm", mllm), "--mllm was given without --references")
    assert run(*given, "--references", file, *source).code == 0
    group = References.from_pretrained(weights, mllm).encode(pictures, PROMPT)
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    load_custom(pipe, References.from_pretrained(weights, mllm))
    result = pipe(PROMPT, reference_images=group, height=32, width=32, **call)
    assert (read(tmp_path / "out/0001.png") == np.asarray(result.images[0])).all()
    record = json.loads((tmp_path / "out/0001.json").read_text())["references"]
    assert (record["model"], record["model_digest"]) == (str(weights), group.model)
    result = run("inspect", weights)
    assert (result.code, result.err) == (0, "")
    for text in ("EasyRef's file", "sdxl", "--mllm", "4 x 40", "attributes", "none"):
        assert text in result.out


def test_bad_references_generate_nothing(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    given = arguments(world, tmp_path / "out")
    refused(run(*given, "--reference-scale", "1"), "--reference-scale was given without")
    refused(run(*given, "--reference-model", model), "--reference-model was given without")
    flags = (*given, "--references", pictures)
    refused(run(*flags), "through a reference model only", "Fix: add --reference-model")
    flags += ("--reference-model", model)
    for scale in ("3", "-1", "nan"):
        refused(run(*flags, "--reference-scale", scale), "--reference-scale", "0 to 2")
    refused(run(*given, "--references", tmp_path / "no.png"), "the image does not exist", "no.png")
    refused(run(*given, "--references", "a" * 5000), "File name too long")
    (tmp_path / "empty").mkdir()
    refused(run(*given, "--references", tmp_path / "empty"), "empty")
    refused(run(*flags, "--references", "a.refs.safetensors"), "takes no further images")
    refused(run(*given, "--references", tmp_path / "a.refs.safetensors"), "a.refs.safetensors")
    refused(run(*given, "--references", pictures, "--reference-model", tmp_path), "references.json")
    assert not list(tmp_path.rglob("*.png"))


def test_bad_groups_are_not_encoded(run: Run, model: str, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "rex.refs.safetensors"
    encode = ("references", "encode", "--reference-model", model)
    refused(run(*encode, pictures, "-o", tmp_path / "rex.safetensors"), "does not end in")
    refused(run(*encode, tmp_path / "no.png", "-o", file), "no.png")
    assert run(*encode, pictures, "-o", file).code == 0
    before = file.read_bytes()
    refused(run(*encode, file, "-o", file), "is encoded already")
    assert file.read_bytes() == before


def test_inspect_reads_models_and_groups(
    run: Run, world: World, model: str, pictures: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rex.refs.safetensors"
    group = References.from_pretrained(model).encode(pictures)
    group.save(file)
    result = run("inspect", model, world.rex, file)
    assert (result.code, result.err) == (0, "")
    for text in ("reference model", "4 x 32", "qwen2_vl", "1 to 28", "any word", "<rex>, 2 tokens"):
        assert text in result.out
    for name, digest, agreement in zip(group.names, group.digests, group.agreement, strict=True):
        assert f"{Path(name).name}: agreement {agreement:.2f}, weight" in result.out
        assert digest[:16] in result.out
    facts = inspect(world.rex, file, model).facts
    assert [rows.get("kind", "concept") for rows in facts] == [
        *("concept", "group of reference images", "reference model")
    ]
    file.write_bytes(file.read_bytes()[:-8])
    refused(run("inspect", file), "rex.refs.safetensors")
    refused(run("inspect", "a" * 5000 + ".safetensors"), "does not exist")
    refused(run("inspect", model, "--layers"), "crosstalk needs two concepts")
