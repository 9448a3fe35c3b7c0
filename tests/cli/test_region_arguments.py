"""customize generate with regions, a library, fused weights, attention backends and memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customize import load_custom
from customize.cli.region_arguments import parse_regions
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.errors import CustomizeError
from tests.cli.making import Run, World, refused
from tests.pipeline.making import draw
from tests.tiny import tiny_sd

PROMPT = "a photo of <rex> and <tom>"
SMALL = ("--steps", "2", "--size", "32", "--device", "cpu", "--seed", "1")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


def test_boxes_and_masks_equal_the_arguments_of_a_call(
    run: Run, world: World, tmp_path: Path
) -> None:
    right = np.zeros((8, 8), dtype=np.uint8)
    right[:, 4:] = 255
    Image.fromarray(right).save(tmp_path / "right=half.png")
    regions = ("--regions", "<rex>=0,0,.5,1", "--regions", f"tom={tmp_path}/right=half.png")
    both = ("generate", world.rex, world.tom, "--base", world.base, "--prompt", PROMPT, *SMALL)
    result = run(*both, *regions, "--merge", "sum", "--output", tmp_path / "out")
    assert result.code == 0, result
    pipe = load_custom(tiny_sd(), world.rex, world.tom, merge="sum")
    box, mask = (0, 0, 0.5, 1), right.astype(np.float32) / 255
    image = drawn(pipe, regions={"<rex>": box, "tom": mask})
    assert np.abs(pixels(tmp_path / "out" / "0001.png") - image).max() <= 1
    assert np.abs(image - drawn(pipe)).max() > 3  # the regions have an effect
    facts = json.loads((tmp_path / "out" / "0001.json").read_text())
    assert facts["regions"] == {"<rex>": [0.0, 0.0, 0.5, 1.0], "tom": "mask of 8x8"}


@pytest.mark.parametrize("boxes", [False, True])
def test_together_equals_the_argument_of_a_call(
    run: Run, world: World, tmp_path: Path, boxes: bool
) -> None:
    flags = ["--regions", "<rex>=0,0,.5,1", "--regions", "tom=.5,0,1,1"] if boxes else []
    both = ("generate", world.rex, world.tom, "--base", world.base, "--prompt", PROMPT, *SMALL)
    steps = ("--steps", "6", "--merge", "sum", "--output", tmp_path / "out")
    result = run(*both, "--together", "--save-masks", *flags, *steps)
    assert result.code == 0, result
    pipe = load_custom(tiny_sd(), world.rex, world.tom, merge="sum")
    areas = {"<rex>": (0, 0, 0.5, 1), "tom": (0.5, 0, 1, 1)}
    image = drawn(pipe, num_inference_steps=6, together=areas if boxes else True)
    assert np.abs(pixels(tmp_path / "out" / "0001.png") - image).max() <= 1
    assert np.abs(image - drawn(pipe, num_inference_steps=6, together=False)).max() > 3
    masks = [pixels(tmp_path / "out" / f"0001.{name}.png") for name in ("rex", "tom")]
    assert [mask.shape for mask in masks] == [(16, 16)] * 2
    if not boxes:
        assert np.abs(sum(masks) - 255).max() <= 1
    facts = json.loads((tmp_path / "out" / "0001.json").read_text())
    assert facts["together"].startswith("together: rex in ")
    problem = "--save-masks needs the masks that --no-together leaves out"
    refused(run(*both, "--save-masks", "--no-together"), problem, "Fix: ")
    problem = "--save-masks has no masks for --regions"
    refused(run(*both, "--save-masks", "--regions", "<rex>=0,0,.5,1"), problem, "--together")


def drawn(pipe: object, **more: object) -> np.ndarray:
    import torch

    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    (image,) = pipe(PROMPT, generator=noise, **{**call, **more}).images  # type: ignore[operator]
    return (image * 255).round().astype(int)


@pytest.mark.parametrize(
    ("region", "says"),
    [
        ("<rex>", "invalid region '<rex>'"),
        ("=0,0,1,1", "invalid region"),
        ("<rex>=0,0,1", "has 3 numbers"),
        ("<rex>=mask.png", "neither a box nor a readable mask: No such file"),
        ("<rex>=/dev/zero", "neither a box nor a readable mask"),
        ("<rexx>=0,0,1,1", "'<rexx>' is not in the prompt"),
        ("<rex>=0,0,2,1", "exceeds the image"),
    ],
)
def test_invalid_regions(run: Run, world: World, region: str, says: str, tmp_path: Path) -> None:
    both = ("generate", world.rex, "--base", world.base, "--prompt", "a <rex>", *SMALL)
    refused(run(*both, "--regions", region, "--output", tmp_path / "out"), says, "Fix: ")


def test_two_regions_for_the_same_words(run: Run, world: World, tmp_path: Path) -> None:
    box = ("--regions", "<rex>=0,0,1,1")
    both = ("generate", world.rex, "--base", world.base, "--prompt", "a <rex>", *SMALL)
    refused(run(*both, *box, *box), "two regions for '<rex>'", "Fix: ")


@given(st.text(max_size=30))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        actual = parse_regions([text])
    except CustomizeError as error:
        assert str(error)
    else:
        assert len(actual) == 1


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_boxes_round_trip_as_text(box: list[float]) -> None:
    assert parse_regions([f"red car={','.join(map(str, box))}"]) == {"red car": tuple(box)}


def test_fuse_attention_memory_and_names(run: Run, world: World, tmp_path: Path) -> None:
    call = ("generate", world.rex, "--base", world.base, "--prompt", "a <rex>", *SMALL)
    for number, more in enumerate(
        ([], ["--fuse"], ["--attention", "native"], ["--memory", "4GB"]), start=1
    ):
        result = run(*call, *more, "--output", tmp_path / "out")
        assert result.code == 0, result
        assert ("memory: " in result.err) == ("--memory" in more)
        facts = json.loads((tmp_path / "out" / f"{number:04}.json").read_text())
        assert (facts["fuse"], facts["attention"], facts["memory"]) == (
            "--fuse" in more,
            "native" if "--attention" in more else None,
            "4GB" if "--memory" in more else None,
        )
        actual = pixels(tmp_path / "out" / f"{number:04}.png")
        assert np.abs(actual - pixels(tmp_path / "out" / "0001.png")).max() <= 1
    call = ("generate", world.rex, world.tom, "--base", world.base, "--prompt", "<ann>", *SMALL)
    result = run(*call, "--names", "ann,", "--output", tmp_path / "named")
    assert result.code == 0 and "note" not in result.err, result
    named = json.loads((tmp_path / "named" / "0001.json").read_text())["concepts"]
    assert [item["trigger"] for item in named] == ["<ann>", "<tom>"]
    refused(run(*call, "--names", "ann"), "1 name for 2 concepts", "--names")
    refused(run(*call, "--attention", "natve"), "unknown attention backend", "did you mean native")
    refused(run(*call, "--memory", "4"), "invalid memory size", "8GB")
    plain = ("generate", "--base", world.base, "--prompt", "a dog", *SMALL)
    refused(run(*plain, "--fuse"), "--fuse needs a concept")


def test_names_distinguish_concepts_of_one_name(run: Run, world: World, tmp_path: Path) -> None:
    save_concept(load_concept(world.rex), tmp_path / "other" / "rex")
    both = (world.rex, tmp_path / "other" / "rex", "--names", ",rex-2")
    call = ("--base", world.base, "--prompt", "<rex> and <rex-2>", *SMALL)
    assert run("generate", *both, *call, "--output", tmp_path / "out").code == 0
    result = run("merge", *both, "--output", tmp_path / "m")
    assert result.code == 0, result
    assert "<rex-2>" in run("inspect", tmp_path / "m").out


def test_concepts_of_a_library_are_in_the_settings_file(
    run: Run, world: World, tmp_path: Path
) -> None:
    assert run("library", "add", tmp_path / "library", world.rex, world.tom).code == 0
    call = ("generate", "--base", world.base, "--library", tmp_path / "library", *SMALL)
    result = run(*call, "--prompt", "a <rex>", "--output", tmp_path / "out")
    assert result.code == 0 and not result.err, result
    facts = json.loads((tmp_path / "out" / "0001.json").read_text())
    assert [item["name"] for item in facts["concepts"]] == ["rex"]
    result = run(*call, "--prompt", "a <rexx>", "--output", tmp_path / "out")
    assert result.code == 2 and "it has <rex>" in result.err
    expected = draw(load_custom(tiny_sd(), world.rex), "a <rex>")
    actual = pixels(tmp_path / "out" / "0001.png") / 255
    assert np.abs(actual - expected).max() <= 2 / 255
