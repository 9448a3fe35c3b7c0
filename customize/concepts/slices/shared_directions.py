"""Files of shared directions: the leading directions of all layers' inputs on generic prompts.

Slices are orthogonal to these directions, so concepts that are merged must avoid the same ones. A
folder of concepts has one file per base model, recorded by the first training run::

    concepts/.shared_directions-0123456789abcdef.safetensors

Its name is a hash of the facts that determine the recording. A recording of another machine differs
by rounding, so all runs use the first one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from customize.atomic import write_atomic
from customize.concepts.adapter import LayerFactors
from customize.concepts.concept_info import BasisInfo
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.io.output_folder import make_folder
from customize.core.avoiding_slices import captured_energy
from customize.core.bases import count_shared_directions
from customize.errors import ConceptError, storage_error
from customize.safe_read import MAX_SAFETENSORS_BYTES, read_bytes, real_path

_FILE = ".shared_directions-{}.safetensors"
_NAMED = re.compile(r"shared directions ([0-9a-f]{16})")
# Share of a layer's energy that directions of another recording may leave in addition.
_SLACK = 0.01


@dataclass(frozen=True, eq=False)
class SharedDirections:
    """A recording of shared directions.

    Attributes:
        name: Hash of the facts that determine the recording, 16 hexadecimal digits; in files of
            earlier versions, a hash of the content.
        factors: Component -> module name, as in files -> (n, in), float32: factor of the second
            moment of the layer's inputs (:meth:`customize.core.input_moment.InputMoment.factor`).
    """

    name: str
    factors: LayerFactors

    @classmethod
    def load(cls, path: Path) -> SharedDirections:
        """Read a file of shared directions.

        Raises:
            ConceptError: If the file is missing or damaged.
        """
        try:
            record = LayerInputs.load(path)
        except ConceptError as error:
            raise ConceptError(
                f"the shared directions cannot be read: {error.problem}",
                where=error.where or path,
                fix="restore an unchanged copy of the file; or delete it, and the next run records "
                "it again, but concepts trained before and after then have overlapping slices",
            ) from error
        named = _NAMED.fullmatch(record.digest)
        return cls(named.group(1) if named else _content_name(record.generic), record.generic)

    def save(self, path: Path) -> SharedDirections:
        """Write the file unless it exists, and return its content.

        Returns:
            The recording in the file: the first one written, in the file's precision.

        Raises:
            ConceptError: If the file exists and cannot be read.
            StorageError: If the file cannot be written.
        """
        make_folder(path.parent)
        record = LayerInputs(f"shared directions {self.name}", {}, self.factors)
        try:
            with suppress(FileExistsError):
                write_atomic(path, record.to_bytes(), new=True)
        except OSError as error:
            raise storage_error(error, path) from error
        return SharedDirections.load(path)

    def covers(self, other: LayerFactors, avoid: int) -> bool:
        """Whether these directions capture as much energy as another recording's.

        A hundredth of a layer's energy may be missing. Signs, order and rotations among directions
        of nearly equal energy do not matter.

        Args:
            other: Factors of the other recording.
            avoid: Maximum number of directions to compare.
        """
        return _input_widths(self.factors) == _input_widths(other) and all(
            _captures_enough(rows, other[component][module], avoid)
            for component, layers in self.factors.items()
            for module, rows in layers.items()
        )


def recording_name(facts: Mapping[str, Any]) -> str:
    """The hash of the facts that determine a recording.

    Args:
        facts: JSON values about the base model and the prompts.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def directions_path(folder: Path, key: str) -> Path:
    """The path of a recording's file."""
    return folder / _FILE.format(key)


def find_direction_files(folder: Path) -> list[Path]:
    """All files of shared directions in a folder, sorted by name."""
    return sorted(folder.glob(_FILE.format("*")))


def copy_shared_directions(library: Path, source: Path, basis: BasisInfo) -> None:
    """Copy the directions that a concept avoids into a library.

    Nothing is copied if the directions are not in the source folder, or if the library has
    directions that cover them.

    Args:
        library: The library's folder.
        source: The folder that contains the concept.
        basis: Basis of the concept.

    Raises:
        OSError: If the file cannot be written.
    """
    if not basis.shared_directions or real_path(source) == real_path(library):
        return
    for path in find_direction_files(source):
        directions = _load_if_readable(path)
        if directions is None or directions.name != basis.shared_directions:
            continue
        existing = [_load_if_readable(other) for other in find_direction_files(library)]
        if not any(
            other and other.covers(directions.factors, basis.num_shared_directions)
            for other in existing
        ):
            with suppress(FileExistsError):
                write_atomic(library / path.name, read_bytes(path, MAX_SAFETENSORS_BYTES), new=True)
        return


def _load_if_readable(path: Path) -> SharedDirections | None:
    try:
        return SharedDirections.load(path)
    except ConceptError:  # reported when the file is needed
        return None


def _captures_enough(rows: Tensor, other: Tensor, avoid: int) -> bool:
    count = count_shared_directions(rows.shape[1], avoid)
    return captured_energy(other, rows[:count]) >= captured_energy(other, other[:count]) - _SLACK


def _input_widths(factors: LayerFactors) -> dict[tuple[str, str], int]:
    return {(c, m): rows.shape[1] for c, layers in factors.items() for m, rows in layers.items()}


def _content_name(factors: LayerFactors) -> str:
    """The name of files of earlier versions: a hash of the content."""
    digest = hashlib.sha256()
    for component, layers in sorted(factors.items()):
        for module, rows in sorted(layers.items()):
            digest.update(f"{component}.{module}\n".encode() + rows.numpy().tobytes())
    return digest.hexdigest()[:16]
