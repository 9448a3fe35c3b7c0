"""One line on what a run has come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from customize.concepts.concept_info import ConceptInfo

_NOTICEABLE = 0.02  # of the base's loss
_TOO_LITTLE = "try more steps, or higher learning rates"


@dataclass(frozen=True)
class IdentityResult:
    """What a judge says of the last sample.

    Attributes:
        shows: whether it shows the subject of the training pictures.
        text: that in words, with the judge's number.
        advice: what to try where it does not, before more steps; empty: nothing is known.
    """

    shows: bool
    text: str
    advice: str = ""


#: The facts of a concept -> what a judge says of its last sample; None: there is no judge.
IdentityJudge = Callable[[ConceptInfo], IdentityResult | None]


def format_verdict(info: ConceptInfo, identity: IdentityResult | None = None) -> str | None:
    """One line that judges a run and names what to try; None where nothing was measured."""
    loss: Any = info.training.get("fixed_loss")
    numbers: list[Any] = (
        [loss.get(key) for key in ("base", "learned")] if isinstance(loss, dict) else []
    )
    if not numbers or not all(isinstance(number, float) and number > 0 for number in numbers):
        return None
    base, learned = numbers
    change = learned / base - 1.0
    found = f"the loss on fixed noise went from {base:.4f} to {learned:.4f} ({change:+.0%})"
    if change > _NOTICEABLE:
        judged, advice = "worse than the base", "try lower learning rates"
    elif change > -_NOTICEABLE:
        judged, advice = "hardly anything learned", _TOO_LITTLE
    else:
        judged = "learned"
        advice = "" if identity else "look at the samples; if they copy the pictures, fewer steps"
    if identity is not None:
        found += f", and {identity.text}"
        if not identity.shows:
            judged = "the pictures' subject is not learned" if judged == "learned" else judged
            advice = "; ".join(filter(None, (identity.advice, advice))) or _TOO_LITTLE
    return f"{info.name}: {judged}: {found}." + (f" Next: {advice}." if advice else "")
