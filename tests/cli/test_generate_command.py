"""Generated images, their settings files, and that none is overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from customize import load_custom
from customize.cli import generated_images
from customize.cli.generation_plan import parse_size
from customize.concepts.io.write_concept import save_concept
from customize.errors import ConfigError
from tests.cli.making import Run, World, refused
from tests.forked import COMMAND, run_forked
from tests.tiny import drawn, tiny_flux, tiny_qwen_image, tiny_sd, tiny_z_image
from tests.tiny_llm import tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_wan

PROMPT = "a photo of <rex> on the beach"


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_and_settings_files(run: Run, world: World, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    arguments = (
        *("generate", world.rex, world.tom, "--base", world.base, "--weights", "1,0.5"),
        *("--prompt", PROMPT, "--prompt", "a photo of <tom>", "--negative", "a red hat"),
        *("--steps", "2", "--guidance", "3", "--seed", "4", "--count", "2", "--device", "cpu"),
        *("--output", output),
    )
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    assert f"Wrote 0001.png to 0004.png to {output}" in result.out
    assert len(list(output.iterdir())) == 8
    made = [json.loads((output / f"{k:04}.json").read_text()) for k in range(1, 5)]
    assert [(item["prompt"], item["seed"]) for item in made] == [
        *((PROMPT, 4), (PROMPT, 5)),
        *(("a photo of <tom>", 4), ("a photo of <tom>", 5)),
    ]
    first = made[0]
    assert (first["negative"], first["steps"], first["guidance"]) == ("a red hat", 2, 3.0)
    assert (first["width"], first["height"], first["dtype"]) == (32, 32, "float32")
    assert [(c["trigger"], c["weight"]) for c in first["concepts"]] == [
        ("<rex>", 1.0),
        ("<tom>", 0.5),
    ]

    pipe = load_custom(tiny_sd(), world.rex, world.tom, weights=[1.0, 0.5])
    image = pipe(
        PROMPT,
        negative_prompt="a red hat",
        num_inference_steps=2,
        guidance_scale=3,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    assert (read(output / "0001.png") == np.asarray(image)).all()
    assert (read(output / "0001.png") != read(output / "0002.png")).any()


def test_avoid_equals_the_argument_of_a_call(run: Run, world: World, tmp_path: Path) -> None:
    arguments = ("generate", world.rex, "--base", world.base, "--prompt", PROMPT, "--steps", "2")
    arguments += ("--guidance", "3", "--device", "cpu", "--output", tmp_path / "pictures")
    assert run(*arguments).code == run(*arguments, "--avoid", "hat, snow").code == 0
    assert json.loads((tmp_path / "pictures" / "0002.json").read_text())["avoid"] == "hat, snow"
    plain, cleaned = (read(tmp_path / "pictures" / f"000{k}.png") for k in (1, 2))
    assert (plain != cleaned).any()
    pipe = load_custom(tiny_sd(), world.rex)
    seed = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 2, "guidance_scale": 3, "generator": seed}
    assert (cleaned == np.asarray(pipe(PROMPT, avoid="hat, snow", **steps).images[0])).all()
    refused(run(*arguments, "--avoid", " , "), "avoid= contains no words")
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_video_models_generate_one_frame(run: Run, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_wan().save_pretrained(base)
    arguments = ("--prompt", "a dog", "--steps", "2", "--size", "32", "--seed", "4")
    run("generate", "--base", base, *arguments, "--device", "cpu", "--output", tmp_path / "out")
    import torch

    noise = torch.Generator().manual_seed(4)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "generator": noise}
    expected = drawn(tiny_wan(), "a dog", output_type="pil", **call)[0]
    assert (read(tmp_path / "out" / "0001.png") == np.asarray(expected)).all()


def test_numbering_continues_and_nothing_is_overwritten(
    run: Run, world: World, tmp_path: Path
) -> None:
    (tmp_path / "0007.json").write_text("mine")
    arguments = ("generate", "--base", world.base, "--prompt", "a dog", "--steps", "1")
    result = run(*arguments, "--size", "48x32", "--output", tmp_path)
    assert f"Wrote 0008.png to {tmp_path}" in result.out
    assert read(tmp_path / "0008.png").shape == (32, 48, 3)
    assert json.loads((tmp_path / "0008.json").read_text())["guidance"] == 7.5
    run(*arguments, "--output", tmp_path)
    assert (tmp_path / "0009.png").is_file()
    assert (tmp_path / "0007.json").read_text() == "mine"


def test_numbers_used_by_another_process_are_skipped(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("generate", "--base", world.base, "--prompt", "a dog", "--steps", "1")
    arguments += ("--size", "32", "--count", "2", "--output", tmp_path)
    generate_image = generated_images.generate_image

    def meanwhile(*arguments: Any) -> Any:
        if not (tmp_path / "0002.png").exists():
            (tmp_path / "0001.json").write_text("of another")  # its image is not yet written
            (tmp_path / "0002.png").write_text("of another")
        return generate_image(*arguments)

    monkeypatch.setattr(generated_images, "generate_image", meanwhile)
    result = run(*arguments)
    assert result.out == f"Wrote 0003.png to 0004.png to {tmp_path}\n"
    assert (tmp_path / "0001.json").read_text() == "of another"
    assert (tmp_path / "0002.png").read_text() == "of another"
    assert {path.name for path in tmp_path.iterdir()} == {
        *("0001.json", "0002.png", "0003.json", "0003.png", "0004.json", "0004.png")
    }
    (tmp_path / "0007.rex.png").write_text("a mask whose image was deleted")
    assert generated_images.next_free_number(tmp_path) == 8


def test_notes_on_triggers(run: Run, world: World, tmp_path: Path) -> None:
    arguments = ("--base", world.base, "--steps", "1", "--output", tmp_path)
    with pytest.warns(UserWarning, match=r"contains <rexx>.*did you mean <rex>"):
        result = run("generate", world.rex, *arguments, "--prompt", "a photo of <rexx>")
    assert (result.code, result.err) == (0, "")
    result = run("generate", *arguments, "--prompt", "a photo of <rexx>")
    assert result.err == "note: no concept is loaded, so <rexx> has no effect\n"
    result = run("generate", world.rex, *arguments, "--prompt", "a photo of a dog")
    assert result.err == "note: the prompt 'a photo of a dog' contains none of the triggers <rex>\n"
    assert run("generate", *arguments, "--prompt", "a photo of a dog").err == ""


def test_a_truncated_trigger_is_warned_of_once(world: World, tmp_path: Path) -> None:
    """The command prints one line for all images of the prompt."""
    prompt = f"a photo of a dog {'in the snow ' * 40}<rex>"
    call = ["generate", world.rex, "--base", world.base, "--prompt", prompt, "--device", "cpu"]
    call += ["--steps", "1", "--size", "32", "--count", "2", "--output", str(tmp_path)]
    done = run_forked(COMMAND, *call)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "cut off" in line)
    assert line.startswith("note: ") and "<rex> is cut off" in line and " tokens" in line
    assert "Warning" not in done.stderr


def test_invalid_input_generates_nothing(run: Run, world: World, tmp_path: Path) -> None:
    output = tmp_path / "pictures"
    arguments = ("--base", world.base, "--prompt", PROMPT, "--output", output)
    refused(run("generate", tmp_path / "rex", *arguments), "the concept does not exist")
    refused(run("generate", world.rex, world.rex, *arguments), "two concepts are called rex")
    refused(run("generate", world.rex, *arguments, "--weights", "1,2"), "2 weights for 1 concept")
    refused(run("generate", world.rex, *arguments, "--size", "big"), "invalid size 'big'")
    refused(run("generate", world.rex, *arguments, "--size", "33"), "33 pixels", "multiples of")
    (tmp_path / "file").write_text("")
    arguments = ("--base", world.base, "--prompt", PROMPT, "--output", tmp_path / "file")
    refused(run("generate", world.rex, *arguments), "cannot be written", "file")
    assert not list(output.glob("*"))


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--seed", "9" * 23, "exceeds 64 bits"),
        ("--count", "9" * 14, "too many"),
        ("--count", "9" * 40, "too many"),
        ("--steps", "100000", "100000 sampling steps exceed the scheduler's 1000 timesteps"),
        ("--guidance", "inf", "guidance scale inf is not finite"),
        ("--guidance", "nan", "greater than or equal to 0"),
        ("--guidance", "1e300", "seed 0 is not finite"),
        ("--weights", "1e38", "seed 0 is not finite"),
        ("--device", "meta", "device meta cannot be used"),
        ("--negative", "\udcff", "is not UTF-8"),
    ],
)
def test_numbers_out_of_range_generate_nothing(
    run: Run, world: World, tmp_path: Path, flag: str, value: str, says: str
) -> None:
    arguments = ("generate", world.rex, "--base", world.base, "--prompt", PROMPT, "--steps", "1")
    refused(run(*arguments, "--output", tmp_path / "pictures", flag, value), says, "Fix: ")
    assert not list(tmp_path.rglob("*.png"))


Flags = tuple[str, ...]
GUIDED, LED = ("--guidance", "2.5"), ("--negative", "a cat")
#: Maker -> flags, and the arguments of the pipeline's call.
CALLS: dict[str, tuple[Callable[[], Any], Flags, dict[str, Any]]] = {
    "flux dev": (tiny_flux, GUIDED, {"guidance_scale": 2.5}),
    "flux schnell": (
        lambda: tiny_flux(guidance=False),
        GUIDED,
        {"true_cfg_scale": 2.5, "negative_prompt": ""},
    ),
    "qwen_image": (tiny_qwen_image, GUIDED, {"true_cfg_scale": 2.5, "negative_prompt": ""}),
    "qwen_image led": (tiny_qwen_image, LED, {"negative_prompt": "a cat"}),
    "qwen_image_21": (
        tiny_qwen_image_21,
        (*GUIDED, *LED),
        {"true_cfg_scale": 2.5, "negative_prompt": "a cat"},
    ),
    "z_image": (tiny_z_image, GUIDED, {"guidance_scale": 2.5}),
    "krea2 led": (tiny_krea2, LED, {"negative_prompt": "a cat"}),
    "flux2 klein": (tiny_flux2_klein, GUIDED, {"guidance_scale": 2.5}),
    "wan": (tiny_wan, (*GUIDED, *LED), {"guidance_scale": 2.5, "negative_prompt": "a cat"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_guidance_and_negative_prompts_reach_every_family(
    run: Run, tmp_path: Path, name: str
) -> None:
    make, flags, expected = CALLS[name]
    make().save_pretrained(tmp_path / "base")
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    pictures = []
    for guidance_arguments in ({}, expected):
        noise = torch.Generator().manual_seed(0)
        actual = drawn(
            make(), "a dog", output_type="pil", generator=noise, **call, **guidance_arguments
        )
        pictures.append(np.asarray(actual[0]))
    arguments = ("--prompt", "a dog", "--steps", "2", "--size", "32", "--device", "cpu")
    output = tmp_path / "pictures"
    result = run("generate", "--base", tmp_path / "base", *arguments, *flags, "--output", output)
    assert (result.code, result.err) == (0, "")
    assert (read(output / "0001.png") == pictures[1]).all()
    assert (pictures[0] != pictures[1]).any(), "the flags make no difference"
    noted = json.loads((output / "0001.json").read_text())["guidance"]
    defaults = {"qwen_image led": 4.0, "krea2 led": 4.5}
    assert noted == defaults.get(name, 2.5)


@pytest.mark.parametrize(
    ("make", "flags", "says"),
    [
        (
            lambda: tiny_flux2_klein(distilled=True),
            GUIDED,
            "distilled for sampling without guidance",
        ),
        (tiny_flux, LED, "ignores negative prompts"),
        (lambda: tiny_flux(guidance=False), LED, "add --guidance above 1"),
        (tiny_qwen_image_21, LED, "the base ignores negative prompts at guidance scale 1"),
        (tiny_z_image, (*LED, "--guidance", "0"), "add --guidance above 0"),
        (tiny_sd, (*LED, "--guidance", "1"), "add --guidance above 1"),
    ],
)
def test_ignored_guidance_and_negative_prompts_are_refused(
    run: Run, tmp_path: Path, make: Callable[[], Any], flags: Flags, says: str
) -> None:
    make().save_pretrained(tmp_path / "base")
    arguments = ("generate", "--base", tmp_path / "base", "--prompt", "a dog", *flags)
    refused(run(*arguments, "--size", "32", "--output", tmp_path / "pictures"), says)
    assert not list(tmp_path.glob("pictures/*"))


@pytest.mark.parametrize(
    ("make", "flag", "says"),
    [
        (tiny_flux2_klein, "--negative", "Flux2KleinPipeline has no argument negative_prompt"),
        (tiny_qwen_image_21, "--negative", "ignores negative prompts"),
    ],
)
def test_pipelines_without_negative_prompt_or_with_an_image_argument_first(
    run: Run, tmp_path: Path, make: Callable[[], Any], flag: str, says: str
) -> None:
    make().save_pretrained(tmp_path / "base")
    arguments = (
        *("generate", "--base", tmp_path / "base", "--prompt", "a dog", "--steps", "1"),
        *("--size", "32", "--output", tmp_path / "pictures"),
    )
    refused(run(*arguments, flag, "2"), says, flag)
    assert not (tmp_path / "pictures").exists()
    assert run(*arguments).code == 0
    noise = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 1, "height": 32, "width": 32}
    expected = make()(prompt="a dog", generator=noise, **call).images[0]
    assert (read(tmp_path / "pictures" / "0001.png") == np.asarray(expected)).all()


def test_a_concept_of_another_base(run: Run, world: World, tmp_path: Path) -> None:
    from tests.pipeline.making import concept
    from tests.tiny import tiny_sd3

    save_concept(concept(tiny_sd3(), "rex"), tmp_path / "rex")
    result = run("generate", tmp_path / "rex", "--base", world.base, "--prompt", PROMPT)
    refused(result, "rex", "sd3")


@pytest.mark.parametrize(
    ("text", "size"), [(None, None), ("512", (512, 512)), ("768x512", (768, 512))]
)
def test_sizes(text: str | None, size: tuple[int, int] | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-8", "512x", "1e3", "512 512", "999999"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid size"):
        parse_size(text)
