"""Invalid input: one line, exit code 2, and no written files."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from customize.concepts.io.file_layout import INFO_FILE, LORA_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept, write_single_file
from customize.errors import ConceptError
from tests.cli.making import Run, World, photos, refused
from tests.pipeline.making import assert_same, concept, everything
from tests.tiny import tiny_sd, tiny_sd3


def train(run: Run, world: World, folder: Path, *words: str, **settings: object) -> None:
    """Assert that ``customize train`` refuses these settings in one line after its plan."""
    values: dict[str, object] = {
        "base": world.base,
        "images": folder / "photos",
        "output": folder / "max",
        "name": "max",
        "class_word": "dog",
        "rank": 2,
        "steps": 2,
        "device": "cpu",
    } | settings
    flags = [
        part for key, value in values.items() for part in ("--" + key.replace("_", "-"), str(value))
    ]
    result = run("train", *flags)
    assert result.code == 2, result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for word in (*words, " Fix: "):
        assert word in lines[0], lines[0]
    assert not (folder / "max").exists()


# Pictures


def noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def corrupt(path: Path) -> None:
    noise().save(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


def truncated(path: Path) -> None:
    noise().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def animated(path: Path) -> None:
    noise().save(path, save_all=True, append_images=[Image.new("RGB", (64, 64))], duration=50)


def bomb(path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def caption(path: Path) -> None:
    noise().save(path)
    path.with_suffix(".txt").write_text("a dog")


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("bad.png", corrupt, "the image cannot be read"),
        ("bad.png", truncated, "the image cannot be read"),
        ("bad.jpg", truncated, "the image cannot be read"),
        ("bad.webp", truncated, "the image cannot be read"),
        ("bad.jpg", Path.touch, "damaged or not an image"),
        ("bad.png", lambda path: Image.new("RGB", (1, 1)).save(path), "only 1 x 1 pixels"),
        ("bad.webp", animated, "animated"),
        ("bad.png", bomb, "may be an attack"),
        ("bad.png", caption, "1 image has a caption without the trigger <max>: bad.png"),
    ],
)
def test_unusable_images(
    run: Run, world: World, tmp_path: Path, name: str, make, says: str
) -> None:
    folder = photos(tmp_path / "photos")
    make(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    where = folder if make is caption else folder / name
    train(run, world, tmp_path, says, str(where))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_cmyk_and_16_bit_images_train(run: Run, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(folder / "cmyk.jpg")
    Image.fromarray(np.full((32, 32), 30_000, np.uint16)).save(folder / "deep.png")
    arguments = ("--images", folder, "--output", tmp_path / "max", "--name", "max")
    more = ("--class-word", "dog", "--rank", "2", "--steps", "1", "--device", "cpu")
    more += ("--num-shared-directions", "0", "--no-record-inputs")
    result = run("train", "--base", world.base, *arguments, *more)
    assert result.code == 0, result.err
    assert load_concept(tmp_path / "max").info.name == "max"


def test_folder_without_images(run: Run, world: World, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    train(run, world, tmp_path, "no images in the folder", str(tmp_path / "photos"))
    train(run, world, tmp_path, "No such file", "none", images=tmp_path / "none")


def test_lone_surrogate_in_a_caption(run: Run, world: World, tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    line = '{"file_name": "0.png", "text": "lone \\ud800 <max>"}'
    (folder / "metadata.jsonl").write_text(line)
    train(run, world, tmp_path, "line 1 has a lone surrogate for 0.png", "metadata.jsonl")


# Settings


def test_unusable_device_and_output(run: Run, world: World, tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    train(run, world, tmp_path, "device meta cannot be used", device="meta")
    train(run, world, tmp_path, "holds the concept rex", world.rex, output=world.rex)
    below = tmp_path / "photos" / "0.png" / "x"
    train(run, world, tmp_path, "the output folder is a file", str(below), output=below)


def test_rank_above_a_width_is_refused_before_images_are_encoded(
    run: Run, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("customize.training.latents_and_embeddings.cache_images", None)
    photos(tmp_path / "photos")
    for method, most in (("orthogonal", 14), ("lora", 16)):
        says = ("the rank 17 is above the width", "(rank)", f"at most {most}")
        train(run, world, tmp_path, *says, rank=17, method=method)


def test_unwritable_output_is_refused_before_a_model_is_loaded(
    run: Run, world: World, tmp_path: Path
) -> None:
    photos(tmp_path / "photos")
    base = tmp_path / "none"
    # Not even root may create folders there.
    output = Path("/proc/nobody") if Path("/proc").is_dir() else tmp_path / ("x" * 300)
    train(run, world, tmp_path, "cannot be written", str(output), output=output, base=base)
    for more in ((), ("--fuse", "--base", base)):
        result = run("merge", world.rex, "--output", output, *more)
        refused(result, "cannot be written", str(output))


# Bases


@pytest.fixture(scope="module")
def unknown_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of no known family."""
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    folder = tmp_path_factory.mktemp("stranger")
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def without_a_weight(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.bias"]
    save_file(weights, file, {"format": "pt"})


def cut_short(base: Path) -> None:
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def as_pickles(base: Path) -> None:
    for file in base.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_a_weight, "the base's files lack the weight unet.conv_in.bias"),
        (cut_short, "the base cannot be loaded"),
        (as_pickles, "the base cannot be loaded"),
        (shutil.rmtree, "the base cannot be loaded"),
    ],
)
def test_damaged_bases(
    run: Run,
    world: World,
    tmp_path: Path,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    damage(base)
    photos(tmp_path / "photos")
    train(run, world, tmp_path, says, str(base), base=base)
    drawing = ("--prompt", "a dog", "--device", "cpu", "--output", tmp_path / "pictures")
    refused(run("generate", "--base", base, *drawing), says, str(base))
    refused(
        run("merge", world.rex, "--fuse", "--base", base, "--output", tmp_path / "m"),
        says,
        str(base),
    )
    assert not (tmp_path / "m").exists()


def test_bases_of_unknown_families_and_missing_files(
    run: Run, world: World, tmp_path: Path, unknown_pipeline: Path
) -> None:
    photos(tmp_path / "photos")
    drawing = ("--prompt", "a dog", "--device", "cpu", "--output", tmp_path / "pictures")
    cases = [
        (unknown_pipeline, "no known model family has these parts: unet: UNet2DModel"),
        ("model.safetensors", "there is no such file"),
    ]
    for base, says in cases:
        train(run, world, tmp_path, says, base=base)
        refused(run("generate", "--base", base, *drawing), says)
        refused(run("generate", world.rex, "--base", base, *drawing[2:], "--prompt", "<rex>"), says)
        refused(run("merge", world.rex, "--fuse", "--base", base, "--output", tmp_path / "m"), says)
    refused(run("generate", "--base", "model.ckpt", *drawing), "can run code", "model.ckpt")


# Concepts


def edited(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, header)

    return damage


LAYER = "text_encoder.encoder.layers.0.self_attn.k_proj.lora_B.weight"
SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-50]), "is damaged"),
    "cut in its header": (lambda file: file.write_bytes(file.read_bytes()[:50]), "is damaged"),
    "a NaN": (edited(lambda t: t[LAYER].fill_(torch.nan)), "is NaN or infinite"),
    "a missing key": (edited(lambda t: t.pop(LAYER)), f"the key {LAYER} is missing"),
    "an extra key": (edited(lambda t: t.update(x=torch.ones(1))), "the key x is unknown"),
    "a wrong shape": (
        edited(lambda t: t.update({LAYER: torch.ones(3, 2)})),
        "the digest in the facts is not that",
    ),
    "a wrong rank": (edited(lambda t: t.update({LAYER: torch.ones(32, 3)})), "have no product"),
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.mark.parametrize("single", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("kind", SPOILED)
def test_damaged_concepts(
    run: Run, world: World, tmp_path: Path, pipe, kind: str, single: bool
) -> None:
    damage, says = SPOILED[kind]
    if single:
        path = file = write_single_file(concept(pipe), tmp_path / "rex.safetensors")
    else:
        path = save_concept(concept(pipe), tmp_path / "rex")
        file = path / LORA_FILE
    damage(file)
    refused(run("inspect", path), says, str(path), " Fix: ")
    refused(run("generate", path, "--base", "none", "--prompt", "<rex>"), says, str(path))
    check_nothing_changes(pipe, [world.tom, path], says)


def check_nothing_changes(pipe, sources: list[object], says: str) -> None:
    """A refused concept leaves the pipeline unchanged."""
    before = everything(pipe)
    for fuse in (False, True):
        with pytest.raises(ConceptError, match=says.replace(".", r"\.")):
            pipe.load_custom(*sources, fuse=fuse)
        assert_same(before, everything(pipe))


@pytest.mark.parametrize("ending", ["ckpt", "bin", "pt"])
def test_pickles(run: Run, world: World, tmp_path: Path, pipe, ending: str) -> None:
    path = tmp_path / f"model.{ending}"
    path.write_bytes(b"\x80\x04")
    refused(run("inspect", path), "can run code", str(path), " Fix: ")
    check_nothing_changes(pipe, [world.tom, path], "can run code")


def test_names_with_path_separators(run: Run, world: World, tmp_path: Path, pipe) -> None:
    path = save_concept(concept(pipe), tmp_path / "rex")
    facts = json.loads((path / INFO_FILE).read_text())
    (path / INFO_FILE).write_text(json.dumps(facts | {"name": "../rex"}))
    refused(run("inspect", path), "invalid at name", str(path / INFO_FILE), " Fix: ")
    refused(run("merge", world.tom, path, "--output", tmp_path / "m"), "invalid at name")
    check_nothing_changes(pipe, [world.tom, path], "invalid at name")
    assert not (tmp_path / "m").exists()


def test_concepts_of_another_family_or_width(run: Run, world: World, tmp_path: Path, pipe) -> None:
    wide = concept(pipe).info.fingerprint | {"denoiser": "0" * 64}
    save_concept(concept(tiny_sd3()), tmp_path / "family")
    save_concept(concept(pipe, fingerprint=wide), tmp_path / "width")
    drawing = ("--base", world.base, "--prompt", "<rex>", "--device", "cpu")
    for name in ("family", "width"):
        path = tmp_path / name
        result = run("generate", path, *drawing, "--output", tmp_path / "pictures")
        refused(result, "the concept rex was learned on", "differs", " Fix: ")
        check_nothing_changes(pipe, [world.tom, path], "differs")
    assert not (tmp_path / "pictures").exists()
