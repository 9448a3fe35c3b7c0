"""The state of a customized pipeline: one object, kept on the denoiser.

It is on the denoiser and not on the pipeline, because pipelines made from the same components share
the denoiser, and so everything that is attached. :func:`get_state` is the only reader. Apart from
this object the package leaves these attributes on objects of others, each where it must be:

- ``_customize_tag`` on every component that concepts change: a component saved by itself is
  refused, and one that a second pipeline shares is recognized. It does not refer to the state,
  since tokenizers are copied and pickled by themselves;
- ``_customize_triggers`` on tokenizers and ``_customize_stock`` on their subclass, for the same
  reason (:mod:`customize.pipeline.tokenizer_subclass`);
- buffers ``_customize_casts_*`` on fused layers, which every cast of the layer must reach
  (:mod:`customize.pipeline.dtype_casts`);
- ``_customize_patched`` on functions that replace diffusers' own, which a reloaded module must
  recognize;
- ``_customize_attention`` and ``_customize_memory`` on models whose attention backend or memory
  plan was chosen, with or without concepts (:mod:`customize.base`); ``_customize_ends`` on text
  encoders (:mod:`customize.concepts.tokens.token_rows`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from customize.errors import PipelineError
from customize.pipeline.model_guards import (
    ADAPTER_NAME,
    TAG_ATTRIBUTE,
    guard_saving,
    make_unsaveable_error,
    unguard_saving,
)

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.adapter import Adapter
    from customize.concepts.input_statistics import LayerInputs
    from customize.concepts.merge.component_weights import Weight
    from customize.concepts.types import Adaptation
    from customize.families import Family
    from customize.pipeline.update_cache import UpdateCache

S = TypeVar("S", bound="StageSetting")

_STATE_ATTRIBUTE = "_customize"

#: (component, module name) -> a fused weight before fusing, on the CPU, with the casts that its
#: layer went through since.
WeightOriginals = dict[tuple[str, str], "Tensor"]

#: (component, parameter name) -> a changed bias or norm before the change, on the CPU; None: the
#: layer had no bias.
VectorOriginals = dict[tuple[str, str], "Tensor | None"]


@dataclass(frozen=True, eq=False)
class AttachedConcept:
    """One attached concept.

    Attributes:
        weight: Factor of its update, or one for each component or block.
        fused: Whether its update is in the base weights, and not in an adapter.
        routed: Whether a prompt of the latest call named it, so that the next call may detach it.
    """

    concept: Adaptation
    weight: Weight
    fused: bool
    routed: bool = False

    @property
    def name(self) -> str:
        """Name of the concept."""
        return self.concept.info.name


@dataclass(frozen=True, eq=False)
class MergePlan:
    """How the attached concepts are merged into one update.

    Attributes:
        requested_method: A name of :data:`customize.core.merges.MERGES`, or
            "auto": fusion if every concept has input statistics, else a sum.
        method: The method that "auto" resolved to; "sum" for fewer than two concepts.
        input_statistics: Concept name -> statistics of its layer inputs, for "fusion".
        method_settings: Settings of the method.
    """

    requested_method: str = "auto"
    method: str = "sum"
    input_statistics: Mapping[str, LayerInputs] = field(default_factory=dict)
    method_settings: Mapping[str, Any] = field(default_factory=dict)


class StageSetting:
    """Base class of what ``load_custom`` keeps for a stage until ``unload_custom()`` drops it.

    A pipeline keeps one setting of each type; a new one replaces the one before.

    Attributes:
        update_cache: Cache for attachments that change from call to call. While a setting has one,
            wrapped layers and vocabulary entries stay when a concept is detached.
        unsaveable: Reason why the pipeline cannot be saved with this setting; empty if it can.
    """

    update_cache: UpdateCache | None = None
    unsaveable: str = ""

    def bind(self, family: Family) -> StageSetting:
        """Return the setting to keep for a model, checked against it; nothing changes.

        Args:
            family: Family of all components that carry concepts or will.
        """
        return self

    def report(self, state: AttachedState) -> str:
        """Return the line that ``pipe.custom`` prints."""
        return str(self)


@dataclass(eq=False)
class OwnershipTag:
    """Tag on every component that one state changes.

    Attributes:
        unsaveable: Reason why the component cannot be saved at present; empty if it can.
    """

    unsaveable: str = ""


@dataclass(eq=False)
class AttachedState:
    """Everything needed to change or undo what was done to the models.

    Attributes:
        attached: Concept name -> concept, in the order of loading.
        merge_plan: How the concepts are merged.
        adapters: The adapters beside the base weights, one for each model.
        weight_originals: Fused weights before fusing.
        vector_originals: Changed biases and norms before the change.
        stage_settings: Type of a setting -> the setting of a stage for all calls.
        token_names: (key of a token dictionary, trigger) -> the vocabulary entries added for it.
        layerwise_hooks: Handles of the hooks for tokens with an embedding for each layer.
        components: Key -> every changed model and tokenizer, also if a pipeline replaced it since.
        tag: Tag on these components.
        call_reports: Name of a stage -> what it did in the latest call, in one line; dropped when
            what is attached changes.
        derived: Key -> what was computed from what is attached; dropped when that changes.
    """

    attached: dict[str, AttachedConcept] = field(default_factory=dict)
    merge_plan: MergePlan = field(default_factory=MergePlan)
    adapters: list[Adapter] = field(default_factory=list)
    weight_originals: WeightOriginals = field(default_factory=dict)
    vector_originals: VectorOriginals = field(default_factory=dict)
    stage_settings: dict[type[StageSetting], StageSetting] = field(default_factory=dict)
    token_names: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    layerwise_hooks: list[Any] = field(default_factory=list)
    components: dict[str, Any] = field(default_factory=dict)
    tag: OwnershipTag = field(default_factory=OwnershipTag)
    call_reports: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Any] = field(default_factory=dict)

    def get_setting(self, kind: type[S]) -> S | None:
        """Return the stage setting of this type; None if there is none."""
        setting = self.stage_settings.get(kind)
        return setting if isinstance(setting, kind) else None

    @property
    def update_cache(self) -> UpdateCache | None:
        """Cache of a stage setting for attachments that change from call to call."""
        caches = [setting.update_cache for setting in self.stage_settings.values()]
        return next((cache for cache in caches if cache is not None), None)

    @property
    def changes_models(self) -> bool:
        """Whether concepts are attached, or calls may attach some."""
        return bool(self.attached) or self.update_cache is not None

    @property
    def has_layerwise_tokens(self) -> bool:
        """Whether a concept has tokens with an embedding for each cross-attention layer."""
        return any(attached.concept.info.token_layers for attached in self.attached.values())

    @property
    def has_all_adapters(self) -> bool:
        """Whether every adapter is still in its model, and nobody deleted it."""
        return all(adapter.is_attached() for adapter in self.adapters)

    @property
    def has_active_adapters(self) -> bool:
        """Whether every adapter acts: nobody deleted, disabled or replaced it."""
        layers = (
            layer
            for adapter in self.adapters
            for modules in adapter.layers.values()
            for layer in modules.values()
            # With an update cache some layers are wrapped that no attached concept changes.
            if layer.lora_A[ADAPTER_NAME].weight.numel()
        )
        return self.has_all_adapters and all(
            ADAPTER_NAME in layer.active_adapters and not layer.disable_adapters for layer in layers
        )


def get_state(pipe: Any) -> AttachedState | None:
    """Return the state of the models of a pipeline; None if nothing is attached."""
    for component in vars(pipe).values():
        attributes = getattr(component, "__dict__", {})
        wrapped = attributes.get("_modules")
        if wrapped and "_orig_mod" in wrapped:  # torch.compile's wrapper
            attributes = vars(wrapped["_orig_mod"])
        if _STATE_ATTRIBUTE in attributes:
            state: AttachedState = attributes[_STATE_ATTRIBUTE]
            return state
    return None


def set_state(family: Family, state: AttachedState) -> None:
    """Store the state on the denoiser, or remove it if nothing is attached any more.

    Args:
        family: Family of all components that the state changes.
        state: The state to store.
    """
    state.tag.unsaveable = _unsaveable_reason(state)
    if state.changes_models or state.stage_settings:
        setattr(family.denoiser, _STATE_ATTRIBUTE, state)
    else:
        vars(family.denoiser).pop(_STATE_ATTRIBUTE, None)
    if state.changes_models:
        state.components = customized_components(family)
        for component in state.components.values():
            setattr(component, TAG_ATTRIBUTE, state.tag)
            guard_saving(component)
    else:
        for component in state.components.values():
            vars(component).pop(TAG_ATTRIBUTE, None)
            unguard_saving(component)
        state.components = {}


def customized_components(family: Family) -> dict[str, Any]:
    """Return key -> model or tokenizer, for all components that attaching concepts changes."""
    return family.adaptable | get_tokenizers(family)


def get_tokenizers(family: Family) -> dict[str, Any]:
    """Return key -> tokenizer, for all components that a prompt may be passed to."""
    from transformers import PreTrainedTokenizerBase

    return {
        key: component
        for key, component in family.components.items()
        if isinstance(component, PreTrainedTokenizerBase)
    }


def check_saveable(pipe: Any) -> None:
    """Refuse to save a pipeline with a component that saving would not write as it is.

    A pipeline whose concepts are all fused is saved with them: weights, tokens and embeddings.

    Raises:
        PipelineError: A concept is attached as an adapter, or has embeddings for each layer.
    """
    for component in vars(pipe).values():
        tag = getattr(getattr(component, "_orig_mod", component), TAG_ATTRIBUTE, None)
        if tag is not None and tag.unsaveable:
            raise make_unsaveable_error(tag.unsaveable)


def check_shared_components(family: Family, state: AttachedState) -> None:
    """Refuse a pipeline that shares only some of the components that concepts are attached to.

    The state covers all components: a vocabulary or an adapter that two pipelines changed
    independently would be wrong for one of them.

    Args:
        family: Family of the pipeline's own components. Those that it freed are not compared.
        state: State of the pipeline's models; an empty one if they have none.

    Raises:
        PipelineError: Names the components.
    """
    components = customized_components(family)
    tags = {key: vars(component).get(TAG_ATTRIBUTE) for key, component in components.items()}
    foreign = sorted(key for key, tag in tags.items() if tag not in (None, state.tag))
    if foreign:
        others = sorted(components.keys() - set(foreign))
        raise PipelineError(
            f"the {' and '.join(foreign)} of this pipeline carry concepts that were attached "
            "through another pipeline, with which it does not share its "
            f"{' and '.join(others) or 'components'}",
            where=", ".join(foreign),
            fix=f"call unload_custom() on that pipeline first, put its {family.denoiser_key} back "
            "if it was replaced, or load this pipeline with components of its own",
        )
    replaced = sorted(
        key
        for key, component in components.items()
        if state.components and state.components.get(key) is not component
    )
    if replaced:
        raise PipelineError(
            f"the {family.denoiser_key} of this pipeline carries concepts that were attached "
            f"together with another {' and '.join(replaced)}",
            where=", ".join(replaced),
            fix="attach through the pipeline that shares all, or call unload_custom() first",
        )


def _unsaveable_reason(state: AttachedState) -> str:
    """Return why components with this state cannot be saved; empty if they can."""
    for setting in state.stage_settings.values():
        if setting.unsaveable:
            return setting.unsaveable
    adapters = [name for name, attached in state.attached.items() if not attached.fused]
    if adapters:
        return (
            f"the concepts {', '.join(adapters)} are attached beside the weights, and stock "
            "diffusers could not open what is saved"
        )
    layerwise = [
        name for name, attached in state.attached.items() if attached.concept.info.token_layers
    ]
    if layerwise:
        return (
            f"the concepts {', '.join(layerwise)} have embeddings for each cross-attention layer, "
            "which a saved pipeline cannot hold"
        )
    return ""
