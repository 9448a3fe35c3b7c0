"""Whether concepts can be attached to one model together."""

from __future__ import annotations

from collections.abc import Sequence

from customize.concepts.concept_info import ConceptInfo
from customize.concepts.types import Adaptation, LoraInfo
from customize.errors import ConceptError


def check_compatible(concepts: Sequence[Adaptation]) -> None:
    """Check that one model can have all the concepts attached.

    Raises:
        ConceptError: If there are no concepts, two have one name, or two were trained on different
            architectures or sizes.
    """
    if not concepts:
        raise ConceptError("there is nothing to merge", fix="give at least one concept")
    reference = concepts[0].info
    names: set[str] = set()
    for concept in concepts:
        info = concept.info
        if info.name in names:
            raise ConceptError(
                f"two concepts are called {info.name}",
                fix="give each concept once, or rename one of them (--names)",
            )
        names.add(info.name)
        reason = incompatibility(reference, info)
        if reason:
            raise ConceptError(
                reason,
                where=info.name,
                fix="merge concepts of one base model, or of bases of the same architecture",
            )
        # Imported LoRAs have no fingerprint; the shapes of their layers are compared on merging.
        reference = reference if reference.fingerprint else info


def incompatibility(a: ConceptInfo | LoraInfo, b: ConceptInfo | LoraInfo) -> str:
    """Why two concepts belong to different architectures; empty if they may share one.

    Fingerprints are compared only where both concepts have one.
    """
    both = a.fingerprint and b.fingerprint
    if a.family == b.family and (not both or a.fingerprint == b.fingerprint):
        return ""
    return (
        f"{a.name} was trained on {a.family} ({a.base or 'unknown'}) and {b.name} on {b.family} "
        f"({b.base or 'unknown'}), which differ in architecture or size"
    )
