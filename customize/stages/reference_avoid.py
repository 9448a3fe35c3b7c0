"""What ``avoid=`` removes from the references of a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from customize.pipeline.stage import CallContext
from customize.references.avoided_values import AvoidedText
from customize.references.seams import seam_of
from customize.stages.decor.reference_values import AvoidedContent, encode_phrases
from customize.stages.reference_tokens import PromptReferences
from customize.user_warnings import warn_user

# The strength where it is "auto". Of 48 pictures of 24 identities that the benchmark does not
# use, 2 % still show a colour of their references that is avoided (94 % without avoid=), and 23 % a
# pattern (60 %). A colour that the references do not show costs identity: 60 % becomes 44 %.
_AUTO_STRENGTH = 1.25


def avoid_in_references(
    context: CallContext, references: Sequence[PromptReferences]
) -> list[PromptReferences]:
    """Return the references of each prompt with what the call avoids in them.

    Warns where the family has no values of text that it could be removed by.

    Raises:
        ConfigError: A phrase has more tokens than the text encoder reads.
    """
    content: AvoidedContent | None = context.shared.get(AvoidedContent)
    family = context.family
    if content is None:
        return list(references)
    if not seam_of(family).has_text_values:
        warn_about_avoided(
            context, f"in family {family.name} the values of a word depend on the timestep too"
        )
        return list(references)
    encoded = encode_phrases(family, sorted({p for phrases in content.phrases for p in phrases}))
    strength = _AUTO_STRENGTH if content.strength is None else content.strength
    rows = {
        phrases: AvoidedText(torch.cat([encoded[phrase] for phrase in phrases]), strength)
        for phrases in content.phrases
        if phrases
    }
    # There are more phrases where a second prompt is a longer list, which pipelines refuse.
    return [
        dataclasses.replace(each, avoided=rows.get(phrases))
        for each, phrases in zip(references, content.phrases, strict=False)
    ]


def warn_about_avoided(context: CallContext, reason: str) -> None:
    """Warn that ``avoid=`` does not act on the references of a call, if it has both."""
    if AvoidedContent in context.shared:
        warn_user(
            "avoid= acts on the prompt alone, and the references still show what it names: "
            f"{reason}"
        )
