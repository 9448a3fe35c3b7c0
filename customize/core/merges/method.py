"""The declaration of a merge method: its function, settings and requirements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from customize.core.lowrank import LowRank
from customize.core.scalars import as_float, is_integer
from customize.errors import ConfigError
from customize.near_names import suggest_names
from customize.text import quote


@dataclass(frozen=True)
class RecordedInputs:
    """Recorded inputs of one layer, for methods that declare ``needs_inputs``.

    A factor is an (n, in) matrix S; ``S^T S`` is the second moment of the inputs, of trace 1, as
    :meth:`customize.core.input_moment.InputMoment.factor` returns it.

    Attributes:
        concepts: One factor for each update; None where the layer was not recorded.
        preserved: Factors of attached concepts that are not part of the merge.
        generic: Factors of the base model's inputs for prompts without the concepts.
    """

    concepts: Sequence[Tensor | None]
    preserved: Sequence[Tensor] = ()
    generic: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Setting:
    """A setting of a merge method: a keyword argument of its function.

    Attributes:
        name: The keyword.
        help: One sentence for the command line, without the default.
        default: The value if it is not set; None where the function derives it from the updates.
        minimum: Smallest value, inclusive.
        maximum: Largest value, inclusive.
        is_integer: Whether only integers are valid.
        is_seed: Whether it seeds a random generator, so that each layer needs its own seed.
    """

    name: str
    help: str
    default: float | None
    minimum: float = -math.inf
    maximum: float = math.inf
    is_integer: bool = False
    is_seed: bool = False

    def check(self, value: object, method: str) -> None:
        """Check the type and the range of a value.

        Args:
            value: The value.
            method: The name of the merge method, for the error message.

        Raises:
            ConfigError: If the value is not a number, or is out of range.
        """
        kind = "an integer" if self.is_integer else "a number"
        if not is_integer(value, -(2**63)) if self.is_integer else math.isnan(as_float(value)):
            raise ConfigError(
                f"invalid {self.name} {quote(value)} of the merge {method}: not {kind}",
                where=self.name,
                fix=f"give {kind}",
            )
        if not self.minimum <= as_float(value) <= self.maximum:
            bounds = (
                f"from {self.minimum:g} to {self.maximum:g}"
                if self.maximum < math.inf
                else f"of at least {self.minimum:g}"
            )
            raise ConfigError(
                f"invalid {self.name} {value} of the merge {method}: out of range",
                where=self.name,
                fix=f"give {kind} {bounds}",
            )


@dataclass(frozen=True)
class MergeMethod:
    """A way to merge the updates of one weight.

    Attributes:
        name: The name that users type.
        summary: What it computes, for help texts: a phrase without a final period.
        merge: ``merge(updates, weights, **settings) -> LowRank``; methods that need inputs take
            :class:`RecordedInputs` as a third positional argument. It must raise ConceptError or
            ConfigError for updates and weights that do not fit together, as
            :func:`customize.core.lowrank.weighted_sum` does.
        settings: The keyword arguments of ``merge``.
        min_concepts: The least number of concepts that it merges, 1 or 2.
        needs_inputs: Whether it depends on recorded inputs of the layers.
        is_separable: Whether the contribution of each concept stays valid if others are fused
            into the weights at another time.
    """

    name: str
    summary: str
    merge: Callable[..., LowRank] = field(repr=False)
    settings: tuple[Setting, ...] = ()
    min_concepts: int = 2
    needs_inputs: bool = False
    is_separable: bool = False

    @property
    def defaults(self) -> dict[str, float | None]:
        """Setting name -> default."""
        return {setting.name: setting.default for setting in self.settings}

    def check_settings(self, values: Mapping[str, Any]) -> None:
        """Check the names, types and ranges of settings.

        Raises:
            ConfigError: If the method has no setting of a name, or a value is invalid.
        """
        settings = {setting.name: setting for setting in self.settings}
        for name, value in values.items():
            if name not in settings:
                raise ConfigError(
                    f"the merge {self.name} has no setting {name}",
                    where=name,
                    fix=suggest_names(name, settings, otherwise="leave it out"),
                )
            settings[name].check(value, self.name)
