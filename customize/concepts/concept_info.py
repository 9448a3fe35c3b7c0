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


# A field of BasisInfo -> its key in concept.json and in the digest over it.
_BASIS_KEYS = {"num_shared_directions": "avoid", "shared_directions": "shared"}


class BasisInfo(BaseModel):
    """The orthogonal matrices O whose columns a concept's down-projections are.

    Attributes:
        kind: A name in :data:`customize.core.bases.BASES`.
        seed: Seed of the matrix of each width; concepts with different seeds are not orthogonal.
        scale: The down-projections are ``scale * O[:, columns]^T``.
        num_shared_directions: How many leading directions of each layer's inputs the slices are
            orthogonal to, at most; see :func:`customize.core.bases.count_shared_directions`. The
            columns then number the remaining width.
        shared_directions: Name of the recording of these directions, 16 hexadecimal digits; empty
            if there are none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cosine", "gaussian_qr"] = "cosine"
    seed: int = Field(0, ge=0, lt=2**64)
    scale: FiniteFloat = Field(1.0, gt=0)
    num_shared_directions: int = Field(default=0, ge=0, le=128)
    shared_directions: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")

    @model_validator(mode="before")
    @classmethod
    def _rename_stored_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = {key: field for field, key in _BASIS_KEYS.items()}
        return {fields.get(key, key): value for key, value in values.items()}

    @model_serializer(mode="plain")
    def _serialize(self) -> dict[str, Any]:
        """Serialize by the stored keys; the later ones only if set, so that digests stay."""
        values: dict[str, Any] = {"kind": self.kind, "seed": self.seed, "scale": self.scale}
        if self.num_shared_directions:
            values |= {key: getattr(self, field) for field, key in _BASIS_KEYS.items()}
        return values


def check_slices(slices: Mapping[str, Sequence[int]], rank: int, basis: BasisInfo) -> None:
    """Check that every slice has as many distinct columns, in range, as the rank.

    Args:
        slices: Input width, as text -> column numbers.
        rank: Columns of a slice.
        basis: Basis of the slices.

    Raises:
        ValueError: If a width is not a positive integer, or its columns are wrong.
    """
    for width, columns in slices.items():
        if not re.fullmatch(r"[1-9][0-9]{0,6}", width):
            raise ValueError(f"slices: {width[:MAX_NAME]!r} is not a layer width")
        distinct = len(set(columns)) == len(columns) == rank
        limit = int(width) - count_shared_directions(int(width), basis.num_shared_directions)
        if not distinct or not all(0 <= column < limit for column in columns):
            raise ValueError(f"slices: width {width} needs {rank} distinct columns below {limit}")


class ConceptInfo(BaseModel):
    """The facts about a concept, as stored in ``concept.json``.

    Attributes:
        name: Name of the concept and of its folder.
        trigger: The word for the concept in prompts, such as ``<rex>``.
        class_word: The class of the concept, such as ``dog``.
        family: Name of the model family.
        base: The base model as the user gave it: a path or hub id.
        fingerprint: Architecture of the base; a model must match it.
        method: "orthogonal" (frozen down-projections, a slice of the basis) or "lora" (both factors
            trained).
        basis: Basis of the slices; None for "lora".
        rank: Rank of every update.
        alpha: Numerator of the updates' scale alpha / rank.
        slices: Input width, as text -> columns of the basis; empty for "lora".
        num_tokens: Tokens of the trigger in each vocabulary; 0 if the trigger is plain text.
        token_layers: Number of cross-attention layers with separate token embeddings; 0 if one
            embedding serves all layers.
        training: Settings and metadata of the training run.
        scores: Measured scores.
        created: Date and time, ISO 8601.
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
    def _check_plain_line(cls, text: str) -> str:
        if not _PLAIN.fullmatch(text):
            raise ValueError("must be one line without control characters")
        return text

    @field_validator("fingerprint", "training", "scores")
    @classmethod
    def _check_storable(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not _all_finite(value):
            raise ValueError("contains a number that is not finite, which JSON cannot store")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("contains text that is not valid Unicode") from None
        return value

    @model_validator(mode="after")
    def _check_method(self) -> ConceptInfo:
        if self.method == "lora":
            if self.basis is not None or self.slices:
                raise ValueError("a concept with the method lora has no basis and no slices")
            return self
        if self.basis is None or not self.slices:
            raise ValueError("a concept with the method orthogonal needs a basis and slices")
        check_slices(self.slices, self.rank, self.basis)
        return self

    @model_validator(mode="after")
    def _check_token_layers(self) -> ConceptInfo:
        if self.token_layers and not self.num_tokens:
            raise ValueError("token_layers needs num_tokens above 0")
        return self

    def __repr_args__(self) -> Any:
        # Without the fields that have hundreds of numbers.
        long = ("fingerprint", "slices", "training", "scores")
        return [(name, value) for name, value in super().__repr_args__() if name not in long]

    @property
    def trained_with(self) -> list[str]:
        """Names of the concepts that were trained in the same run."""
        names = self.training.get("learned_with")
        return [str(name) for name in names] if isinstance(names, list) else []

    @property
    def trigger_words(self) -> str:
        """The words for the concept in a prompt: its trigger."""
        return self.trigger

    @property
    def triggers(self) -> tuple[str, ...]:
        """All triggers: one."""
        return (self.trigger,)

    @property
    def scale(self) -> float:
        """Scale of every update: alpha / rank."""
        return self.alpha / self.rank


def parse_info(values: Any, where: object) -> ConceptInfo:
    """Validate parsed JSON as :class:`ConceptInfo`.

    Args:
        values: The parsed JSON.
        where: File or argument, for errors.

    Raises:
        ConceptError: If the schema version is unknown, or a field is missing, unknown or invalid.
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
            "the concept's facts are nested too deeply",
            where=where,
            fix="get an unchanged copy of the concept",
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the top level"
        field, problem = (text[:MAX_NAME] for text in (field, first["msg"]))
        raise ConceptError(
            f"the concept's facts are invalid at {field}: {problem}",
            where=where,
            fix="get an unchanged copy of the concept",
        ) from error


def _all_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_all_finite, value.values()))
    return all(map(_all_finite, value)) if isinstance(value, list) else True
