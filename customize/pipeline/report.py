"""The report of a pipeline's customization: what ``pipe.custom`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from customize.base.apply_memory_plan import get_applied_plan
from customize.base.attention.apply_backend import BackendReport, report_backends
from customize.concepts.merge.component_weights import Weight
from customize.concepts.slices.overlap import find_overlaps
from customize.concepts.tokens.token_rows import known_tokens
from customize.errors import PipelineError
from customize.pipeline.sources import get_family
from customize.pipeline.stage import Stage
from customize.pipeline.state import AttachedState, get_state
from customize.text import plural

_TITLES = ("name", "trigger", "class", "weight", "rank", "slices", "mode")


@dataclass(frozen=True)
class ConceptRow:
    """One concept in the table of :class:`Customization`."""

    name: str
    trigger: str
    class_word: str
    weight: Weight
    rank: int
    slices: str
    mode: str


@dataclass(frozen=True, repr=False)
class Customization:
    """What is attached to a pipeline, at the time of the report.

    Attributes:
        rows: One for each concept, in the order of loading.
        model: Family of the model, and device and dtype of its denoiser.
        merge: Method by which several concepts are merged.
        attention: Backend that took effect in each component; empty if none was chosen.
        memory: What was done to fit the model into memory; empty if nothing was.
        reports: Name of a stage -> report of its setting in one line, for stages that have a
            setting: "library" with its folder, "avoid" with the words that it projects out; or of
            the latest call: "together" with the parts of the picture that concepts had.
    """

    rows: tuple[ConceptRow, ...]
    model: str
    merge: str = "sum"
    attention: tuple[BackendReport, ...] = ()
    memory: str = ""
    reports: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is attached, chosen or set."""
        return not (self.rows or self.attention or self.memory or self.reports)

    def __repr__(self) -> str:
        lines = [self._table() if self.rows else "no concepts attached"]
        if self.attention:
            lines.append(f"attention: {'; '.join(map(str, self.attention))}")
        if self.memory:
            lines.append(f"memory: {self.memory}")
        return "\n".join([*lines, *self.reports.values()])

    def _table(self) -> str:
        lines = [_TITLES]
        for row in self.rows:
            numbers = (f"{row.weight:g}", str(row.rank))
            lines.append((row.name, row.trigger, row.class_word, *numbers, row.slices, row.mode))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        count = plural(len(self.rows), "concept")
        merged = f", merged by {self.merge}" if len(self.rows) > 1 else ""
        return "\n".join([f"{count} on {self.model}{merged}", texts[0], rule, *texts[1:]])


def report_customization(pipe: Any, stages: Sequence[Stage]) -> Customization:
    """Return what ``pipe.custom`` shows.

    It raises no PipelineError, since debuggers and ``hasattr`` read properties.

    Args:
        pipe: Any pipeline.
        stages: The stages whose settings are reported, in this order.
    """
    try:
        family = get_family(pipe)
    except PipelineError:
        return Customization((), "no known model family")
    state = get_state(pipe) or AttachedState()
    overlapping: dict[str, list[str]] = {}
    for overlap in find_overlaps([attached.concept for attached in state.attached.values()]):
        overlapping.setdefault(overlap.first, []).append(overlap.second)
        overlapping.setdefault(overlap.second, []).append(overlap.first)
    rows = []
    for name, attached in state.attached.items():
        info = attached.concept.info
        slices = "none" if info.basis is None else "disjoint"
        if name in overlapping:
            slices = "shared with " + ", ".join(overlapping[name])
        mode = "fused" if attached.fused else _adapter_mode(state)
        mode += ", by the prompt" if attached.routed else ""
        triggers = {subject.trigger for subject in attached.concept.subjects}
        if any(
            trigger in triggers
            and not known_tokens(state.components[family.clip_encoders[key]], [trigger])
            for key, trigger in state.token_names
        ):
            mode += " (tokens removed by someone else)"
        trigger, class_word = info.trigger_words or "-", info.class_word or "-"
        row = ConceptRow(name, trigger, class_word, attached.weight, info.rank, slices, mode)
        rows.append(row)
    denoiser = family.denoiser
    dtype = str(denoiser.dtype).removeprefix("torch.")
    plan = get_applied_plan(family)
    return Customization(
        tuple(rows),
        f"{family.name} ({denoiser.device}, {dtype})",
        merge=state.merge_plan.method,
        attention=tuple(report_backends(family.components)),
        memory="" if plan is None else str(plan),
        reports={
            stage.name: state.stage_settings[stage.setting].report(state)
            for stage in stages
            if stage.setting in state.stage_settings
        }
        | state.call_reports,
    )


def _adapter_mode(state: AttachedState) -> str:
    if not state.has_all_adapters:
        return "adapter (removed by someone else)"
    return "adapter" if state.has_active_adapters else "adapter (not active)"
