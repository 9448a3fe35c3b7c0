"""The facts about a concept, as ``concept.json`` stores them; validated when made or read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from customize.core.bases import count_shared_directions
from customize.errors import ConceptError

SCHEMA_VERSION = 1

Method = Literal["orthogonal", "lora"]

#: Longest name in a file: of a tensor, a field or a layer.
MAX_NAME = 256

#: The pattern of a concept's name.
NAME_PATTERN = r"[a-z0-9][a-z0-9_-]{0,63}"

_PLAIN = re.compile(r"[^\x00-\x1f\x7f]*")


class BasisInfo(BaseModel):
    """The orthogonal matrices that a concept's down-projections are slices of.

    Attributes:
        kind: a name in :data:`customize.core.bases.BASES`.
        seed: fixes the matrix of each width; concepts with other seeds are not orthogonal.
        scale: the down-projections are ``scale * O[:, columns]^T``.
        avoid: how many leading directions of each layer's inputs the slices stay out of, at most;
            see :func:`customize.core.bases.count_shared_directions`. Columns are of what is left of
            the width.
        shared: a name for the record of these directions; empty where none are avoided.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cosine", "gaussian_qr"] = "cosine"
    seed: int = Field(0, ge=0, lt=2**64)
    scale: FiniteFloat = Field(1.0, gt=0)
    avoid: int = Field(default=0, ge=0, le=128)
    shared: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")

    @model_serializer(mode="wrap")
    def _as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the later fields where they say nothing, as digests of older files have it."""
        values: dict[str, Any] = serialize(self)
        return values if self.avoid else {k: values[k] for k in ("kind", "seed", "scale")}


def check_slices(slices: Mapping[str, Sequence[int]], rank: int, basis: BasisInfo) -> None:
    """Refuse slices that no concept can have.

    Args:
        slices: input width, as text -> columns.

    Raises:
        ValueError: a width is none, or does not have as many distinct columns as the rank.
    """
    for width, columns in slices.items():
        if not re.fullmatch(r"[1-9][0-9]{0,6}", width):
            raise ValueError(f"slices: {width[:MAX_NAME]!r} is not a layer width")
        distinct = len(set(columns)) == len(columns) == rank
        limit = int(width) - count_shared_directions(int(width), basis.avoid)
        if not distinct or not all(0 <= column < limit for column in columns):
            raise ValueError(f"slices: width {width} needs {rank} distinct columns below {limit}")


class ConceptInfo(BaseModel):
    """The facts on a concept, as they stand in ``concept.json``.

    Attributes:
        name: of the concept and of its folder.
        trigger: what a prompt says, such as ``<rex>``.
        class_word: what it is one of, such as ``dog``.
        family: the model family's name.
        base: the base model as the user gave it, a path or hub id.
        fingerprint: what a model must agree with to take the concept.
        method: "orthogonal" with a frozen slice of a basis, or "lora" with both factors learned.
        basis: of the slices; None for "lora".
        rank, alpha: updates are multiplied by alpha / rank.
        slices: input width, as text -> the columns of the basis; empty for "lora".
        num_tokens: tokens of the trigger in each dictionary; 0 for a concept without its own.
        token_layers: cross-attention layers with an embedding of their own for each token; 0
            where one embedding serves them all.
        training: the settings it was learned with.
        scores: what was measured on it.
        created: date and time, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = Field(pattern=rf"^{NAME_PATTERN}$")
    trigger: str = Field(pattern=rf"^<{NAME_PATTERN}>$")
    class_word: str = Field(min_length=1, max_length=64)
    family: str = Field(pattern=r"^[a-z0-9_]{1,32}$")
    base: str = Field(max_length=500)
    fingerprint: dict[str, JsonValue]
    method: Method = "orthogonal"
    basis: BasisInfo | None = None
    rank: int = Field(ge=1, le=2**20)
    alpha: FiniteFloat = Field(gt=0)
    slices: dict[str, list[int]] = {}
    num_tokens: int = Field(2, ge=0, le=64)
    token_layers: int = Field(0, ge=0, le=1024)
    training: dict[str, JsonValue] = {}
    scores: dict[str, JsonValue] = {}
    created: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), max_length=64
    )

    @field_validator("class_word", "base", "created")
    @classmethod
    def _one_plain_line(cls, text: str) -> str:
        if not _PLAIN.fullmatch(text):
            raise ValueError("must be one line without control characters")
        return text

    @field_validator("fingerprint", "training", "scores")
    @classmethod
    def _storable(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not _finite(value):
            raise ValueError("holds a number that is not finite, which JSON cannot carry")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds a text that is not Unicode, which no file carries") from None
        return value

    @model_validator(mode="after")
    def _slices_fit(self) -> ConceptInfo:
        if self.method == "lora":
            if self.basis is not None or self.slices:
                raise ValueError("a concept of the method lora has neither basis nor slices")
            return self
        if self.basis is None or not self.slices:
            raise ValueError("a concept of the method orthogonal needs its basis and slices")
        check_slices(self.slices, self.rank, self.basis)
        return self

    @model_validator(mode="after")
    def _layers_have_tokens(self) -> ConceptInfo:
        if self.token_layers and not self.num_tokens:
            raise ValueError("a concept without tokens has none for each layer")
        return self

    def __repr_args__(self) -> Any:
        # A few lines: those that are left out have hundreds of numbers.
        long = ("fingerprint", "slices", "training", "scores")
        return [(name, value) for name, value in super().__repr_args__() if name not in long]

    @property
    def learned_with(self) -> list[str]:
        """The names of the concepts that it was learned in one run with."""
        names = self.training.get("learned_with")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def words(self) -> str:
        """What a prompt says to mean it."""
        return self.trigger

    @property
    def triggers(self) -> tuple[str, ...]:
        """All that call it: one."""
        return (self.trigger,)

    @property
    def scale(self) -> float:
        """What every update is multiplied with: alpha / rank."""
        return self.alpha / self.rank


def parse_info(values: Any, where: object) -> ConceptInfo:
    """Parsed JSON as :class:`ConceptInfo`.

    Raises:
        ConceptError: an unknown schema version, or fields that are missing, extra or wrong.
    """
    version = values.get("schema_version") if isinstance(values, dict) else None
    if type(version) is int and version != SCHEMA_VERSION:
        raise ConceptError(
            f"the concept has schema version {version}; this version of customize reads "
            f"{SCHEMA_VERSION}",
            where=where,
            fix="update customize, or save the concept with the version you have",
        )
    try:
        return ConceptInfo.model_validate(values, strict=True)
    except RecursionError as error:
        raise ConceptError(
            "the facts on the concept are nested too deeply",
            where=where,
            fix="get an unchanged copy of the concept",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        place, problem = (text[:MAX_NAME] for text in (place, first["msg"]))
        raise ConceptError(
            f"the facts on the concept are wrong at {place}: {problem}",
            where=where,
            fix="get an unchanged copy of the concept",
        ) from error


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, list) else True
