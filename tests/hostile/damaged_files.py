"""All kinds of files that the package reads, and ways to damage them."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from customize.concepts.concept_info import BasisInfo
from customize.concepts.formats.open_adaptation import open_adaptation
from customize.concepts.io.read_concept import load_concept
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library.index import INDEX_FILE
from customize.concepts.library.library import Library
from customize.concepts.slices.slice_reservations import read_reservations, write_reservation
from customize.errors import CustomizeError
from customize.references.group import ReferenceGroup
from customize.training import checkpoint
from customize.training.data.dataset import read_training_images
from customize.training.settings_file import read_yaml
from tests.concepts.making import same_tensors, small

ABSURD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**400, 1e308, "", "x" * 10_000, "\ud800", "\x1b[31m"),
    *([], {}, [[]], {"a": {"a": []}}, ["x"], "../../etc/passwd"),
)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        make: Writes an intact file into a folder and returns its path.
        read: Reads the file from that folder.
        same: Whether two results of reading are equal; None if changes cannot be detected.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool] | None = None


def _concept(name: str) -> Callable[[Path], Path]:
    return lambda folder: save_concept(small(), folder / "rex") / name


def _single(folder: Path) -> Path:
    return save_concept(small(), folder / "rex.safetensors")


def _lora(folder: Path) -> Path:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(2, 8),
        f"{name}.lora_up.weight": torch.randn(8, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, folder / "a.safetensors", {"ss_network_dim": "2", "ss_network_alpha": "1"})
    return folder / "a.safetensors"


def _checkpoint(folder: Path) -> Path:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.tensor(1.0)}
    state = checkpoint.Checkpoint(5, tensors, {"rank": 2}, [[1, 0.5]], {"scaler": {}})
    return checkpoint.save_checkpoint(folder, state, 1)


def _checkpoints_alike(a: Any, b: Any) -> bool:
    if b is None:
        return True  # damaged ones are passed over, with a note
    facts = [(c.step, c.settings, c.history, c.extra) for c in (a, b)]
    return facts[0] == facts[1] and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


def _index(folder: Path) -> Path:
    save_concept(small(), folder / "rex")
    Library(folder)
    return folder / INDEX_FILE


def _claim(folder: Path) -> Path:
    from customize.concepts.slices.slice_reservations import SliceReservation

    claim = SliceReservation(name="kit", basis=BasisInfo(), rank=2, index=0, slices={"8": [0, 1]})
    write_reservation(claim, folder / "kit")
    return folder / "kit" / ".slice.json"


def _settings(folder: Path) -> Path:
    values = {"base": "b", "images": "i", "output": "o", "name": "rex", "rank": 8, "steps": 10}
    (folder / "a.yaml").write_text(yaml.safe_dump(values | {"validation_prompts": ["a", "b"]}))
    return folder / "a.yaml"


def _picture(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = torch.randint(0, 255, (24, 24, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"0{suffix}")
        return folder / f"0{suffix}"

    return make


def _captions(name: str, text: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        _picture(".png")(folder)
        (folder / name).write_text(text)
        return folder / name

    return make


def _pictures(folder: Path) -> Any:
    return read_training_images(folder, trigger="<rex>", caption="a photo of {}")


_ROW = json.dumps({"file_name": "0.png", "text": "a photo of <rex>"})
_FOLDER = "rex"


def _reference_group(folder: Path) -> Path:
    group = ReferenceGroup(
        torch.ones(2, 3),
        agreement=(1.0, 0.5),
        weights=(1.0, 1.0),
        names=("a.png", "b.png"),
        digests=("0" * 64, "1" * 64),
    )
    return group.save(folder / "rex.refs.safetensors")


KINDS = {
    **{
        f"concept's {name}": Kind(_concept(name), lambda f: load_concept(f / _FOLDER), same_tensors)
        for name in (
            *("concept.json", "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"),
        )
    },
    "single file": Kind(_single, lambda f: load_concept(f / "rex.safetensors"), same_tensors),
    "LoRA from elsewhere": Kind(_lora, lambda f: open_adaptation(f / "a.safetensors")),
    "group of references": Kind(
        _reference_group, lambda f: ReferenceGroup.load(f / "rex.refs.safetensors")
    ),
    "checkpoint": Kind(_checkpoint, checkpoint.load_latest_checkpoint, _checkpoints_alike),
    "index": Kind(_index, lambda f: Library(f).entries, lambda a, b: a == b),
    "claim": Kind(_claim, read_reservations),
    "settings": Kind(_settings, lambda f: read_yaml(f / "a.yaml")),
    "PNG": Kind(_picture(".png"), _pictures),
    "JPEG": Kind(_picture(".jpg"), _pictures),
    "WebP": Kind(_picture(".webp"), _pictures),
    "caption": Kind(_captions("0.txt", "a photo of <rex>"), _pictures),
    "metadata.jsonl": Kind(_captions("metadata.jsonl", f"{_ROW}\n"), _pictures),
}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a part truncated, flipped, overwritten, inserted, deleted or repeated."""
    at, length = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64, 1000))
    head, tail = data[:at], data[at:]
    junk = rng.choice((rng.randbytes(length), b"\0" * length, b"\xff" * length, b"[" * length))
    choices = (
        lambda: head,
        lambda: tail,
        lambda: head + bytes([tail[0] ^ 1 << rng.randrange(8)]) + tail[1:] if tail else b"",
        lambda: head + junk + tail[length:],
        lambda: head + junk + tail,
        lambda: head + tail[length:],
        lambda: data + data[:length],
        lambda: (2 ** rng.randrange(64)).to_bytes(8, "little") + data[8:],
    )
    return rng.choice(choices)()


def with_absurd(values: Any, rng: random.Random) -> Any:
    """Parsed JSON with one value replaced, removed or added."""
    if isinstance(values, dict) and values and rng.random() < 0.8:
        key = rng.choice(sorted(values))
        changed = dict(values)
        choice = rng.random()
        if choice < 0.1:
            del changed[key]
        elif choice < 0.2:
            changed[rng.choice(("", "x" * 5000, "\u202e", f"{key} "))] = rng.choice(ABSURD)
        else:
            changed[key] = with_absurd(changed[key], rng)
        return changed
    if isinstance(values, list) and values and rng.random() < 0.8:
        at = rng.randrange(len(values))
        return [*values[:at], with_absurd(values[at], rng), *values[at + 1 :]]
    return rng.choice(ABSURD)


def with_json_changed(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, or a safetensors file's header, with a value changed."""
    start = 8 + int.from_bytes(data[:8], "little")
    text, tensor_bytes = (data[8:start], data[start:]) if start <= len(data) else (data, b"")
    values = json.loads(text)
    header = values.get("__metadata__") if tensor_bytes else None
    inner = [key for key in header or {} if header[key].startswith("{")]
    if inner and rng.random() < 0.5:  # JSON within the header's JSON
        key = rng.choice(inner)
        header[key] = json.dumps(with_absurd(json.loads(header[key]), rng))
    else:
        values = with_absurd(values, rng)
    new = json.dumps(values).encode()
    return len(new).to_bytes(8, "little") + new + tensor_bytes if tensor_bytes else new


def replaced(path: Path, rng: random.Random) -> None:
    """Replace a file by one that is not regular, or is too large."""
    path.unlink()
    choices: tuple[Callable[[], Any], ...] = (
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("nowhere"),
        path.mkdir,
        path.touch,
        lambda: (path.touch(), os.truncate(path, 7 * 2**30)),
    )
    rng.choice(choices)()


def damage(path: Path, seed: int) -> None:
    """Damage a file in a way that depends only on the seed."""
    rng = random.Random(seed)
    choice = rng.random()
    if choice < 0.1:
        replaced(path, rng)
    elif choice < 0.5 and path.suffix in (".json", ".safetensors"):
        path.write_bytes(with_json_changed(path.read_bytes(), rng))
    else:
        data = path.read_bytes()
        for _ in range(rng.choice((1, 1, 1, 3))):
            data = mutated(data, rng)
        path.write_bytes(data)


def attempt(kind: Kind, folder: Path, seed: int) -> str:
    """Damage a file of a kind and read it: "refused" or "read".

    Raises:
        AssertionError: If the file is read as different content.
        Exception: If an error is not of the package's classes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.manual_seed(0)
    path = kind.make(folder)
    before = kind.read(folder)
    damage(path, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            after = kind.read(folder)
        except CustomizeError as error:
            assert len(str(error)) < 6000 and str(error).isprintable()
            return "refused"
    if kind.same is not None:
        assert kind.same(before, after), "damaged, and taken for something else"
    return "read"
