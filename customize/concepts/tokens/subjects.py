"""Subjects: the token embeddings that triggers refer to, of a concept or of concepts in a merge.

A merged LoRA is one file, with the token embeddings of all its concepts in the header: stock
diffusers refuses files with embeddings as tensors (the ``bundle_emb`` keys of web UIs).
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.core.lowrank import all_finite
from customize.errors import ConceptError

#: The key of the subjects in a merged LoRA's header; see :func:`subjects_to_header`.
SUBJECTS_HEADER = "customize_subjects"

_TRIGGER = re.compile(r"<[a-z0-9][a-z0-9_-]{0,63}>")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_COMPONENT = re.compile(r"text_encoder(_[23])?")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_SUBJECTS, _MAX_TOKENS, _MAX_LAYERS = 4096, 64, 1024


@dataclass(frozen=True, eq=False)
class Subject:
    """A trigger with token embeddings.

    Attributes:
        name: Name of the concept.
        trigger: The trigger, such as ``<rex>``.
        class_word: Class of the concept.
        embeddings: Text encoder's component -> (tokens, width), or (tokens, layers, width) with
            separate embeddings for each cross-attention layer; float32, float16 or bfloat16; not
            empty.
    """

    name: str
    trigger: str
    class_word: str
    embeddings: Mapping[str, Tensor]

    def __repr__(self) -> str:
        kind = f"a {self.class_word}, " if self.class_word else ""
        return f"Subject({self.trigger}: {kind}{self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """Number of the trigger's tokens."""
        return int(next(iter(self.embeddings.values())).shape[0])

    @property
    def token_layers(self) -> int:
        """Number of cross-attention layers with separate embeddings; 0 if one serves all layers."""
        rows = next(iter(self.embeddings.values()))
        return int(rows.shape[1]) if rows.ndim == 3 else 0


def check_subjects(subjects: Iterable[Subject]) -> None:
    """Refuse subjects with the same trigger or name.

    Raises:
        ConceptError: If two subjects have the same trigger or name.
    """
    triggers: dict[str, str] = {}
    names: dict[str, str] = {}
    for subject in subjects:
        if subject.trigger in triggers:
            raise ConceptError(
                f"two concepts, {triggers[subject.trigger]} and {subject.name}, have the same "
                f"trigger {subject.trigger}",
                fix="leave one out, or rename one that is not a merge (--names)",
            )
        if subject.name in names:
            raise ConceptError(
                f"two subjects have the name {subject.name}, with the triggers "
                f"{names[subject.name]} and {subject.trigger}",
                fix="leave one out, or rename one that is not a merge (--names)",
            )
        triggers[subject.trigger] = subject.name
        names[subject.name] = subject.trigger


def subjects_to_header(subjects: Sequence[Subject]) -> dict[str, str]:
    """The header entry of subjects; empty without subjects."""
    if not subjects:
        return {}
    entries = [
        {
            "name": subject.name,
            "trigger": subject.trigger,
            "class_word": subject.class_word,
            "embeddings": {
                key: _pack_rows(rows) for key, rows in sorted(subject.embeddings.items())
            },
        }
        for subject in subjects
    ]
    return {SUBJECTS_HEADER: json.dumps(entries)}


def subjects_from_header(header: Mapping[str, str], where: object) -> tuple[Subject, ...]:
    """Parse the subjects in a merged LoRA's header; empty without subjects.

    Args:
        header: Metadata of the file.
        where: The file, for errors.

    Raises:
        ConceptError: If the entry is invalid, or an embedding is not finite.
    """
    if SUBJECTS_HEADER not in header:
        return ()
    try:
        entries = json.loads(header[SUBJECTS_HEADER])
        if not isinstance(entries, list) or len(entries) > _MAX_SUBJECTS:
            raise ValueError("not a list of subjects")
        subjects = tuple(map(_parse_subject, entries))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConceptError(
            "the trigger embeddings in the file's header cannot be read",
            where=where,
            fix="get an unchanged copy of the file",
        ) from error
    for subject in subjects:
        for key, rows in subject.embeddings.items():
            if not all_finite(rows):
                raise ConceptError(
                    f"an embedding of {subject.trigger} is NaN or infinite",
                    where=f"{where}: {key}",
                    fix="get an unchanged copy of the file",
                )
    check_subjects(subjects)
    return subjects


def _pack_rows(rows: Tensor) -> dict[str, Any]:
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(rows.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
        "data": base64.b64encode(data).decode("ascii"),
    }


def _parse_subject(values: Mapping[str, Any]) -> Subject:
    name, trigger, class_word = (values[key] for key in ("name", "trigger", "class_word"))
    if not _NAME.fullmatch(name) or not _TRIGGER.fullmatch(trigger):
        raise ValueError("invalid name or trigger")
    if not isinstance(class_word, str) or not class_word.isprintable() or len(class_word) > 64:
        raise ValueError("invalid class word")
    embeddings = {key: _unpack_rows(packed) for key, packed in values["embeddings"].items()}
    if not embeddings or not all(map(_COMPONENT.fullmatch, embeddings)):
        raise ValueError("invalid embeddings")
    if len({rows.shape[:-1] for rows in embeddings.values()}) != 1:
        raise ValueError("embeddings with different numbers of tokens")
    return Subject(name, trigger, class_word, embeddings)


def _unpack_rows(packed: Mapping[str, Any]) -> Tensor:
    shape, dtype = packed["shape"], _DTYPES[packed["dtype"]]
    is_shape = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not is_shape or len(shape) not in (2, 3) or shape[0] > _MAX_TOKENS:
        raise ValueError("invalid shape")
    if len(shape) == 3 and shape[1] > _MAX_LAYERS:
        raise ValueError("too many layers")
    data = bytearray(base64.b64decode(packed["data"], validate=True))
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("the data does not fit the shape")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
