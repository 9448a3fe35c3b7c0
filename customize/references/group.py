"""The reference tokens of one group of images, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customize.atomic import write_atomic
from customize.concepts.io.data_files import read_tensors, safetensors_bytes
from customize.core.lowrank import all_finite
from customize.errors import DataError, StorageError, storage_error
from customize.safe_read import as_path
from customize.text import one_line, plural

#: The end of the names of groups' files.
SUFFIX = ".refs.safetensors"

_HEADER = "customize_references"
_FACTS = ("model", "names", "digests", "agreement", "weights", "prompt")


@dataclass(frozen=True, eq=False)
class ReferenceGroup:
    """What a denoiser reads of one group of images.

    Attributes:
        tokens: (num_tokens, width), float32, on the CPU.
        agreement: For each image how well it agrees with the others, in [0, 1]; 1 for one image
            alone. See :mod:`customize.references.agreement`.
        weights: For each image its weight in the tokens, in [0, 1].
        names: For each image its file or position in the argument.
        digests: For each image the SHA-256 of its pixels and attribute.
        prompt: The prompt that the model read; empty if it reads none.
        model: Digest of the model that computed the tokens.
    """

    tokens: Tensor
    agreement: tuple[float, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    digests: tuple[str, ...]
    prompt: str = ""
    model: str = ""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def __repr__(self) -> str:
        rows = zip(self.names, self.agreement, strict=True)
        images = ", ".join(f"{one_line(name)} {agreement:.2f}" for name, agreement in rows)
        return f"ReferenceGroup({plural(len(self), 'image')}; agreement: {images})"

    def save(self, path: str | Path) -> Path:
        """Write the group to a ``.refs.safetensors`` file, atomically.

        Of the images' paths only the names of the files are written.

        Raises:
            ConfigError: The path is no path.
            StorageError: The file has another extension, or cannot be written.
        """
        path = as_path(path, "path")
        if not path.name.endswith(SUFFIX):
            raise StorageError(
                f"a group of references must end in {SUFFIX}",
                where=path,
                fix=f"name it {path.name.split('.')[0]}{SUFFIX}",
            )
        facts = {name: getattr(self, name) for name in _FACTS}
        facts["names"] = [os.path.basename(name) or name for name in self.names]
        data = safetensors_bytes({"tokens": self.tokens}, {_HEADER: json.dumps(facts)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        except OSError as error:
            raise storage_error(error, path) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> ReferenceGroup:
        """Read a ``.refs.safetensors`` file.

        Raises:
            ConfigError: The path is no path.
            ConceptError: The file is missing, cannot be read, or is no safetensors file.
            DataError: It is another kind of file, or its content is damaged.
        """
        path = as_path(path, "path")
        tensors, metadata = read_tensors(path)
        if _HEADER not in metadata or set(tensors) != {"tokens"}:
            raise DataError(
                "the file has no reference tokens",
                where=path,
                fix="save a group as group.save(...) writes it",
            )
        tokens = tensors["tokens"]
        try:
            facts = _parse_facts(metadata[_HEADER])
        except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise _damaged(path, f"its header cannot be read: {error}") from error
        if tokens.ndim != 2 or not tokens.is_floating_point() or not tokens.numel():
            raise _damaged(path, f"its tokens have the shape {tuple(tokens.shape)}")
        if not all_finite(tokens):
            raise _damaged(path, "its tokens are not finite")
        return cls(tokens.to(torch.float32), **facts)


def _parse_facts(text: str) -> dict[str, Any]:
    """Return the attributes in a header.

    Raises:
        KeyError, TypeError or ValueError: One is missing, or has another type or length.
        OverflowError or RecursionError: A number is too large, or the nesting too deep.
    """
    values = json.loads(text)
    facts: dict[str, Any] = {name: _texts([values[name]])[0] for name in ("model", "prompt")}
    facts |= {name: _texts(values[name]) for name in ("names", "digests")}
    for name in ("agreement", "weights"):
        numbers = tuple(float(number) for number in values[name])
        if not all(0.0 <= number <= 1.0 for number in numbers):
            raise ValueError(f"{name} is not between 0 and 1")
        facts[name] = numbers
    lengths = {len(facts[name]) for name in ("names", "digests", "agreement", "weights")}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError("its lists have different lengths, or are empty")
    return facts


def _texts(values: Sequence[Any]) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a text is expected")
    return tuple(values)


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"the file is damaged: {problem}", where=path, fix="encode the images again, and save them"
    )
