"""One line that judges the result of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from customize.concepts.concept_info import ConceptInfo

_NOTICEABLE = 0.02  # change of the loss, relative to the base's
_TOO_LITTLE = "try more steps, or higher learning rates"


@dataclass(frozen=True)
class IdentityResult:
    """A judge's result for the last sample.

    Attributes:
        shows: Whether the sample shows the subject of the training images.
        text: The result as text, with the judge's number.
        advice: What to try before more steps if the subject is not shown; may be empty.
    """

    shows: bool
    text: str
    advice: str = ""


#: Judges the last sample of a concept; returns None if no judge is available.
IdentityJudge = Callable[[ConceptInfo], IdentityResult | None]


def format_verdict(info: ConceptInfo, identity: IdentityResult | None = None) -> str | None:
    """Return one line that judges a run and names what to try next.

    Args:
        info: Info of the concept, with the measured losses.
        identity: A judge's result for the last sample.

    Returns:
        The line; None if no losses were measured.
    """
    loss: Any = info.training.get("fixed_loss")
    numbers: list[Any] = (
        [loss.get(key) for key in ("base", "learned")] if isinstance(loss, dict) else []
    )
    if not numbers or not all(isinstance(number, float) and number > 0 for number in numbers):
        return None
    base, learned = numbers
    change = learned / base - 1.0
    reason = f"the loss on fixed noise went from {base:.4f} to {learned:.4f} ({change:+.0%})"
    if change > _NOTICEABLE:
        judged, advice = "worse than the base", "try lower learning rates"
    elif change > -_NOTICEABLE:
        judged, advice = "hardly anything learned", _TOO_LITTLE
    else:
        judged = "learned"
        advice = "" if identity else "look at the samples; if they copy the images, fewer steps"
    if identity is not None:
        reason += f", and {identity.text}"
        if not identity.shows:
            judged = "the images' subject is not learned" if judged == "learned" else judged
            advice = "; ".join(filter(None, (identity.advice, advice))) or _TOO_LITTLE
    return f"{info.name}: {judged}: {reason}." + (f" Next: {advice}." if advice else "")
