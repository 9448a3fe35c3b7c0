"""What triggers call: the token embeddings of a concept, or of each concept in a merge.

A merged LoRA is one file with the tokens of all its concepts in the header. Tensors of their own
would be the ``bundle_emb`` keys of web UIs, over which stock diffusers refuses the whole file.
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

#: A key of a merged LoRA's header: its subjects, as :func:`subjects_to_header` writes them.
SUBJECTS_HEADER = "customize_subjects"

_TRIGGER = re.compile(r"<[a-z0-9][a-z0-9_-]{0,63}>")
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_COMPONENT = re.compile(r"text_encoder(_[23])?")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MAX_SUBJECTS, _MAX_TOKENS, _MAX_LAYERS = 4096, 64, 1024


@dataclass(frozen=True, eq=False)
class Subject:
    """One thing that a trigger calls, by tokens of its own.

    Attributes:
        name, trigger, class_word: as :class:`customize.concepts.concept_info.ConceptInfo` has them.
        embeddings: token dictionary's key -> (tokens, width), or (tokens, layers, width) where each
            cross-attention layer has its own; float32, float16 or bfloat16; not empty.
    """

    name: str
    trigger: str
    class_word: str
    embeddings: Mapping[str, Tensor]

    def __repr__(self) -> str:
        what = f"a {self.class_word}, " if self.class_word else ""
        return f"Subject({self.trigger}: {what}{self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """Tokens that the trigger stands for."""
        return int(next(iter(self.embeddings.values())).shape[0])

    @property
    def token_layers(self) -> int:
        """Cross-attention layers with embeddings of their own; 0 where one serves them all."""
        rows = next(iter(self.embeddings.values()))
        return int(rows.shape[1]) if rows.ndim == 3 else 0


def check_subjects(subjects: Iterable[Subject]) -> None:
    """Refuse subjects that one prompt could not tell apart.

    Raises:
        ConceptError: two have one trigger or one name.
    """
    triggers: dict[str, str] = {}
    names: dict[str, str] = {}
    for subject in subjects:
        if subject.trigger in triggers:
            raise ConceptError(
                f"two concepts, {triggers[subject.trigger]} and {subject.name}, have the same "
                f"trigger {subject.trigger}",
                fix="leave one of them out, or give one that is no merge another name (--names)",
            )
        if subject.name in names:
            raise ConceptError(
                f"two subjects are called {subject.name}, by {names[subject.name]} and "
                f"{subject.trigger}",
                fix="leave one of them out, or give one that is no merge another name (--names)",
            )
        triggers[subject.trigger] = subject.name
        names[subject.name] = subject.trigger


def subjects_to_header(subjects: Sequence[Subject]) -> dict[str, str]:
    """The header's entry for subjects; none where there are none."""
    if not subjects:
        return {}
    listed = [
        {
            "name": subject.name,
            "trigger": subject.trigger,
            "class_word": subject.class_word,
            "embeddings": {key: _packed(rows) for key, rows in sorted(subject.embeddings.items())},
        }
        for subject in subjects
    ]
    return {SUBJECTS_HEADER: json.dumps(listed)}


def subjects_from_header(header: Mapping[str, str], where: object) -> tuple[Subject, ...]:
    """The subjects of a merged LoRA, from its header; none where it has none.

    Raises:
        ConceptError: they are not as :func:`subjects_to_header` writes them, or a number is not
            finite.
    """
    if SUBJECTS_HEADER not in header:
        return ()
    try:
        listed = json.loads(header[SUBJECTS_HEADER])
        if not isinstance(listed, list) or len(listed) > _MAX_SUBJECTS:
            raise ValueError("no list of subjects")
        subjects = tuple(map(_subject, listed))
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


def _packed(rows: Tensor) -> dict[str, Any]:
    data = rows.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(rows.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
        "data": base64.b64encode(data).decode("ascii"),
    }


def _subject(values: Mapping[str, Any]) -> Subject:
    name, trigger, class_word = (values[key] for key in ("name", "trigger", "class_word"))
    if not _NAME.fullmatch(name) or not _TRIGGER.fullmatch(trigger):
        raise ValueError("no name or trigger")
    if not isinstance(class_word, str) or not class_word.isprintable() or len(class_word) > 64:
        raise ValueError("no class word")
    embeddings = {key: _rows(packed) for key, packed in values["embeddings"].items()}
    if not embeddings or not all(map(_COMPONENT.fullmatch, embeddings)):
        raise ValueError("no embeddings")
    if len({rows.shape[:-1] for rows in embeddings.values()}) != 1:
        raise ValueError("embeddings of different numbers of tokens")
    return Subject(name, trigger, class_word, embeddings)


def _rows(packed: Mapping[str, Any]) -> Tensor:
    shape, dtype = packed["shape"], _DTYPES[packed["dtype"]]
    sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
    if not sizes or len(shape) not in (2, 3) or shape[0] > _MAX_TOKENS:
        raise ValueError("no shape of embeddings")
    if len(shape) == 3 and shape[1] > _MAX_LAYERS:
        raise ValueError("too many layers")
    data = bytearray(base64.b64decode(packed["data"], validate=True))
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError("another size than the shape's")
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
