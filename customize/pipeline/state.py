"""What is attached to a pipeline: kept with its denoiser, shown as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from customize.base.attention.apply_backend import BackendReport
from customize.concepts.adapter import Adapter
from customize.concepts.input_statistics import LayerInputs
from customize.concepts.merge.choose_method import AUTO
from customize.concepts.merge.component_weights import Weight
from customize.concepts.types import Adaptation
from customize.core.merges import SUM
from customize.errors import PipelineError
from customize.families import Family
from customize.families.pipeline_components import uncompiled
from customize.pipeline.call_wrapper import STATE_KEY
from customize.pipeline.fuse_weights import Originals
from customize.pipeline.library_cache import LibraryCache
from customize.pipeline.model_guards import (
    TAG_ATTRIBUTE,
    guard_saving,
    make_unsaveable_error,
    unguard_saving,
)

#: (component, parameter) -> a changed bias or norm as it was, on the CPU; None: there was no bias.
VectorOriginals = dict[tuple[str, str], Tensor | None]


@dataclass(frozen=True, eq=False)
class AttachedConcept:
    """One attached concept.

    Attributes:
        weight: its factor in the weighted sum, or one for each component or block.
        fused: whether it is in the base weights, and not in the adapter.
        routed: whether a prompt named it, so that one that doesn't takes it away again.
    """

    concept: Adaptation
    weight: Weight
    fused: bool
    routed: bool = False

    @property
    def name(self) -> str:
        return self.concept.info.name


@dataclass(frozen=True, eq=False)
class MergePlan:
    """How what is attached becomes one update.

    Attributes:
        requested_method: a name of :data:`customize.core.merges.MERGES`, or
            "auto": fusion where each concept has a record, else a sum.
        method: which it is; "sum" where there are no two concepts to merge.
        input_statistics: concept name -> what its layers read, for "fusion".
        method_settings: of the method.
    """

    requested_method: str = AUTO
    method: str = SUM.name
    input_statistics: Mapping[str, LayerInputs] = field(default_factory=dict)
    method_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class OwnershipTag:
    """What each component carries: whose it is.

    Without a reference to the state, as tokenizers are copied and pickled by themselves.

    Attributes:
        unsaveable: why the component cannot be saved as it is; empty where it can.
    """

    unsaveable: str = ""


@dataclass(eq=False)
class AttachedState:
    """All that must be known to change or undo what was done to the models.

    Attributes:
        attached: concept name -> concept, in the order of loading.
        merge_plan: how they are merged.
        adapters: what sits beside the base weights, one for each model.
        weight_originals: of the fused weights.
        vector_originals: of the changed biases and norms.
        library_cache: the library that prompts take concepts from, if there is one.
        stage_settings: of stages, by their type: what they do to all calls.
        token_names: (token dictionary's key, trigger) -> all its entries, as they were added.
        layerwise_hooks: handles of what serves tokens with an embedding for each layer.
        components: component's key -> every model and tokenizer that is changed, also where a
            pipeline has been given another since.
        ownership_tag: what the parts carry.
    """

    attached: dict[str, AttachedConcept] = field(default_factory=dict)
    merge_plan: MergePlan = field(default_factory=MergePlan)
    adapters: list[Adapter] = field(default_factory=list)
    weight_originals: Originals = field(default_factory=dict)
    vector_originals: VectorOriginals = field(default_factory=dict)
    library_cache: LibraryCache | None = None
    stage_settings: dict[type, Any] = field(default_factory=dict)
    token_names: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    layerwise_hooks: list[Any] = field(default_factory=list)
    components: dict[str, Any] = field(default_factory=dict)
    ownership_tag: OwnershipTag = field(default_factory=OwnershipTag)

    @property
    def has_layerwise_tokens(self) -> bool:
        """Whether a concept has tokens with an embedding for each cross-attention layer."""
        return any(each.concept.info.token_layers for each in self.attached.values())


def get_state(family: Family) -> AttachedState:
    """The state of a model; a new, empty one where nothing is attached.

    It lives with the denoiser and not with the pipeline, because pipelines made from the same
    components share the denoiser, and so what is attached to it.
    """
    return vars(family.denoiser).get(STATE_KEY) or AttachedState()


def set_state(family: Family, state: AttachedState) -> None:
    """Leave the state with the denoiser, or take it away where nothing is attached any more."""
    state.ownership_tag.unsaveable = _unsaveable(state)
    there = bool(state.attached or state.library_cache)
    if there or state.stage_settings:
        setattr(family.denoiser, STATE_KEY, state)
    else:
        vars(family.denoiser).pop(STATE_KEY, None)
    if there:
        state.components = customized_components(family)
    for part in state.components.values():
        if there:
            setattr(part, TAG_ATTRIBUTE, state.ownership_tag)
            guard_saving(part)
        else:
            vars(part).pop(TAG_ATTRIBUTE, None)
            unguard_saving(part)
    if not there:
        state.components = {}


def customized_components(family: Family) -> dict[str, Any]:
    """Component's key -> every model and tokenizer that attaching concepts changes."""
    models = family.adaptable
    return models | get_tokenizers(family)


def get_tokenizers(family: Family) -> dict[str, Any]:
    """Component's key -> tokenizer, for all that a prompt may be given to."""
    from transformers import PreTrainedTokenizerBase

    return {
        key: part
        for key, part in family.components.items()
        if isinstance(part, PreTrainedTokenizerBase)
    }


def check_saveable(pipe: Any) -> None:
    """Refuse to save a pipeline that has a part which saving would not write as it is.

    Where all concepts are fused, what is saved holds them: weights, tokens and embeddings.

    Raises:
        PipelineError: a concept is attached as an adapter, or has embeddings for each layer.
    """
    for part in vars(pipe).values():
        mark = getattr(uncompiled(part), TAG_ATTRIBUTE, None)
        if mark is not None and mark.unsaveable:
            raise make_unsaveable_error(mark.unsaveable)


def check_shared_components(family: Family, state: AttachedState) -> None:
    """Refuse a pipeline that shares some, and not all, of what concepts are attached to.

    What is attached is one state over all the parts: a vocabulary or an adapter that two
    pipelines changed each for itself would be wrong for one of them.

    Raises:
        PipelineError: naming the parts. Those that were freed count as the state's own.
    """
    parts = customized_components(family)
    marked = {key: vars(part).get(TAG_ATTRIBUTE) for key, part in parts.items()}
    foreign = [key for key, mark in marked.items() if mark not in (None, state.ownership_tag)]
    if foreign:
        raise PipelineError(
            f"the {_and(foreign)} of this pipeline carry concepts that were attached through "
            f"another pipeline, with which it does not share its {_and(set(parts) - set(foreign))}",
            where=", ".join(foreign),
            fix=f"call unload_custom() on that pipeline first, put its {family.denoiser_key} back "
            "if it was replaced, or load this pipeline with components of its own",
        )
    others = [key for key, part in parts.items() if state.components.get(key, part) is not part]
    others += [key for key in parts if state.components and key not in state.components]
    if others:
        raise PipelineError(
            f"the {family.denoiser_key} of this pipeline carries concepts that were attached "
            f"together with another {_and(others)}",
            where=", ".join(others),
            fix="attach through the pipeline that shares all, or call unload_custom() first",
        )


def _and(keys: Iterable[str]) -> str:
    return " and ".join(sorted(keys)) or "components"


def _unsaveable(state: AttachedState) -> str:
    """Why models with what is attached cannot be saved; empty where they can."""
    attached = state.attached
    if state.library_cache is not None:
        return (
            "the concepts of a library are attached beside the weights as prompts name them, and "
            "stock diffusers could not open what is saved"
        )
    beside = [name for name, each in attached.items() if not each.fused]
    layered = [name for name, each in attached.items() if each.concept.info.token_layers]
    if beside:
        return (
            f"the concepts {', '.join(beside)} are attached beside the weights, and stock "
            "diffusers could not open what is saved"
        )
    if layered:
        return (
            f"the concepts {', '.join(layered)} have embeddings for each cross-attention layer, "
            "which a saved pipeline cannot hold"
        )
    return ""


@dataclass(frozen=True)
class ConceptRow:
    """One line of :class:`Customization`."""

    name: str
    trigger: str
    class_word: str
    weight: Weight
    rank: int
    slices: str
    mode: str


@dataclass(frozen=True, repr=False)
class Customization:
    """What is attached to a pipeline, at the time of asking.

    Attributes:
        rows: one for each concept, in the order of loading.
        model: family, and device and dtype of the denoiser.
        merge: by which method several concepts are merged.
        attention: which backend took effect in each component; empty where none was chosen.
        memory: what was done to fit the model into memory; empty where nothing was.
        library: where prompts take concepts from, and what of it is in use; empty without one.
        avoid: what prompts are cleaned of, and how; empty where nothing was loaded for that.
    """

    rows: tuple[ConceptRow, ...]
    model: str
    merge: str = SUM.name
    attention: tuple[BackendReport, ...] = ()
    memory: str = ""
    library: str = ""
    avoid: str = ""

    def __repr__(self) -> str:
        lines = [self._concepts()]
        if self.attention:
            lines.append(f"attention: {'; '.join(map(str, self.attention))}")
        if self.memory:
            lines.append(f"memory: {self.memory}")
        if self.library:
            lines.append(f"library: {self.library}")
        if self.avoid:
            lines.append(f"prompts: {self.avoid}")
        return "\n".join(lines)

    def _concepts(self) -> str:
        if not self.rows:
            return "no concepts attached"
        titles = ("name", "trigger", "class", "weight", "rank", "slices", "mode")
        lines = [titles]
        for row in self.rows:
            numbers = (f"{row.weight:g}", str(row.rank))
            lines.append((row.name, row.trigger, row.class_word, *numbers, row.slices, row.mode))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        rule = "  ".join("-" * width for width in widths)
        count = f"{len(self.rows)} concept" + ("s" if len(self.rows) > 1 else "")
        merged = f", merged by {self.merge}" if len(self.rows) > 1 else ""
        return "\n".join([f"{count} on {self.model}{merged}", texts[0], rule, *texts[1:]])
