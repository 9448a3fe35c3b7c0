"""The files of shared directions: what all layers of a base model read on generic prompts.

Slices stay out of the leading ones, so concepts to be merged have to avoid the very same: a folder
of concepts has one file for a base model, which whoever comes first records::

    concepts/.shared_directions-0123456789abcdef.safetensors

Its name is that of what determines the recording. Another machine's recording of the same differs
by rounding, so that the first one is used by all.
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
# Directions of another recording serve where they leave at most this share of a layer's energy
# more than the recording at hand does.
_SLACK = 0.01


@dataclass(frozen=True, eq=False)
class SharedDirections:
    """A recording.

    Attributes:
        name: of what determines it, 16 hexadecimal digits; of a file of an earlier version, of its
            content.
        factors: component -> module, under the names used in files -> (n, in), float32: the factor
            of the second moment of the layer's inputs, as
            :meth:`customize.core.input_moment.InputMoment.factor` gives it.
    """

    name: str
    factors: LayerFactors

    @classmethod
    def load(cls, path: Path) -> SharedDirections:
        """Read a file.

        Raises:
            ConceptError: it is missing or damaged.
        """
        try:
            record = LayerInputs.load(path)
        except ConceptError as error:
            raise ConceptError(
                f"the shared directions cannot be read: {error.problem}",
                where=error.where or path,
                fix="put an unchanged copy of the file back, or delete it, and it is recorded anew "
                "by the next run; what was learned before then no longer has slices apart from "
                "what is learned after",
            ) from error
        named = _NAMED.fullmatch(record.digest)
        return cls(named.group(1) if named else _content_name(record.generic), record.generic)

    def save(self, path: Path) -> SharedDirections:
        """Write it where no file is yet; where one is, by now, that one counts.

        Returns:
            What the file has: that of whoever came first, rounded as it is stored.

        Raises:
            ConceptError: a file is there that cannot be read.
            StorageError: it cannot be written.
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
        """Whether slices that avoid these directions avoid what another recording of the same
        layers calls for, but for a hundredth of each layer's energy.

        Signs, order and turns among directions of nearly equal energy make no difference.

        Args:
            other: the other recording.
            avoid: how many directions are avoided, at most.
        """
        return _shapes(self.factors) == _shapes(other) and all(
            _leaves_little(rows, other[component][module], avoid)
            for component, layers in self.factors.items()
            for module, rows in layers.items()
        )


def recording_name(facts: Mapping[str, Any]) -> str:
    """The name of what determines a recording.

    Args:
        facts: JSON values, of the base model and of what is drawn.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def directions_path(folder: Path, key: str) -> Path:
    """The file of a recording."""
    return folder / _FILE.format(key)


def find_direction_files(folder: Path) -> list[Path]:
    """All files of shared directions in a folder, ordered by name."""
    return sorted(folder.glob(_FILE.format("*")))


def copy_shared_directions(library: Path, source: Path, basis: BasisInfo) -> None:
    """Give a library the directions that a concept from another folder avoids.

    Nothing is done where they are not at hand, or where the library has directions that serve as
    well: whoever came first counts.

    Args:
        source: the folder that the concept's folder or file is in.
        basis: of the concept.

    Raises:
        OSError: they cannot be written.
    """
    if not basis.shared_directions or real_path(source) == real_path(library):
        return
    for path in find_direction_files(source):
        found = _if_readable(path)
        if found is None or found.name != basis.shared_directions:
            continue
        there = [_if_readable(other) for other in find_direction_files(library)]
        if not any(
            other and other.covers(found.factors, basis.num_shared_directions) for other in there
        ):
            with suppress(FileExistsError):
                write_atomic(library / path.name, read_bytes(path, MAX_SAFETENSORS_BYTES), new=True)
        return


def _if_readable(path: Path) -> SharedDirections | None:
    try:
        return SharedDirections.load(path)
    except ConceptError:  # whoever needs it will be told
        return None


def _leaves_little(rows: Tensor, other: Tensor, avoid: int) -> bool:
    count = count_shared_directions(rows.shape[1], avoid)
    return captured_energy(other, rows[:count]) >= captured_energy(other, other[:count]) - _SLACK


def _shapes(factors: LayerFactors) -> dict[tuple[str, str], int]:
    return {(c, m): rows.shape[1] for c, layers in factors.items() for m, rows in layers.items()}


def _content_name(factors: LayerFactors) -> str:
    """How files of an earlier version are called: by their numbers."""
    digest = hashlib.sha256()
    for component, layers in sorted(factors.items()):
        for module, rows in sorted(layers.items()):
            digest.update(f"{component}.{module}\n".encode() + rows.numpy().tobytes())
    return digest.hexdigest()[:16]
