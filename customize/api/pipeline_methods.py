"""The public functions on pipelines, which :mod:`customize.api.patch_diffusers` makes methods.

Torch and diffusers are imported in the functions, so that ``import customize`` stays cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from customize.api.patch_diffusers import patch_when_imported, wrap_calls
from customize.api.short_repr import note_unloaded
from customize.stages import load_stages

if TYPE_CHECKING:
    import torch

    from customize.base.memory_plan import MemoryPlan
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.input_statistics import LayerInputs
    from customize.concepts.types import Concept, Lora
    from customize.pipeline.report import Customization
    from customize.stages.avoid import Decor
    from customize.stages.references import References
    from customize.stages.rewrite import Rewriter

Pipeline = TypeVar("Pipeline")


def load_custom(
    pipe: Pipeline,
    *concepts: str | Path | Concept | Lora | LoraFile | Decor | References | Rewriter,
    weights: Sequence[float | Mapping[str, Any]]
    | Mapping[str, float | Mapping[str, Any]]
    | None = None,
    names: Sequence[str | None] | None = None,
    into: str | Sequence[str | Sequence[str] | None] | None = None,
    ignore: str | Sequence[str] | None = None,
    fuse: bool = False,
    merge: str | Mapping[str, Any] | None = None,
    attention: str | None = None,
    memory: str | None = None,
    library: str | Path | None = None,
    library_cache: str = "2GB",
) -> Pipeline:
    """Attach learned concepts to a pipeline, or change the weights of attached ones.

    With or without concepts it also chooses the attention backend and fits the pipeline into
    memory.

    All concepts of a pipeline are merged: by their exact weighted sum, by fusion, which preserves
    each concept on its own prompts, or by another method. Their triggers, such as ``<rex>``, then
    work in every prompt. A further call adds to what is attached. Everything is validated before
    anything changes; after an error the pipeline is bit for bit as before.

    A pipeline made from this one's components (``from_pipe``, ``Other(**pipe.components)``) shares
    its models and tokenizers and therefore its concepts; loading or unloading on either affects
    both. A pipeline that shares only some of the components with attached concepts is refused. A
    text encoder that the pipeline frees or replaces is kept until the concepts are unloaded.

    Calls of every pipeline also accept ``regions=``, a dict from words of the prompt to the box
    (left, top, right, bottom, as fractions of the image) or the mask that they are restricted to,
    ``together=True``, which keeps several concepts of a prompt apart, and ``avoid=``, words that
    the prompt is cleaned of.

    The call waits until no other call uses the models, and other calls wait for it.

    Args:
        pipe: A standard or modular diffusers pipeline of a known family, on any device, in any
            floating dtype, with model, sequential or group offloading on or off.
        concepts: Folders or single ``.safetensors`` files, hub ids, or Concept objects. A concept
            that is attached already is refused unless it is identical; then only its weight and
            mode change. An ordinary LoRA file, with the keys of diffusers, peft, kohya, ComfyUI or
            LyCORIS, is a concept without a trigger, named after its file; it is refused unless
            every key of it is used. One ``customize.Decor(...)`` among them sets what all calls
            avoid, and replaces the one before. One ``customize.References.from_pretrained(...)``
            lets calls read reference images (``reference_images=``, ``reference_scale=``).
        weights: One finite number for each of ``concepts``, or a dict from concept name to weight,
            which may also name attached concepts. Default: 1.0 for a new concept, unchanged for an
            attached one. Instead of a number, a dict by component and block,
            as diffusers' ``set_adapters`` takes it: ``{"text_encoder": 0.5, "unet": {"down": 0.8,
            "up": {"block_1": [0.4, 0.8, 1.0]}}}``, blocks alone are the denoiser's, and
            parts without a number have 1.0 (:mod:`customize.concepts.merge.component_weights`). A
            weight of 0 removes the concept from these layers. Tokens are not scaled.
        names: New name of each of ``concepts``, or None to keep its own. The concept's trigger
            becomes ``<name>``. For concepts with equal names.
        into: Denoisers of a LoRA file whose keys do not name one, on a model with several (Wan 2.2
            14B): "transformer_2", or ("transformer", "transformer_2") for both, as for a file of
            Wan 2.1. For several files, a list with such an entry, or None, for each. Default: the
            denoiser that the keys begin with, then that of the file's name (``x_high_noise``,
            ``x_low_noise``), otherwise the first one, with a warning.
        ignore: Parts of the files to leave out: components, such as "text_encoder_2", "bias",
            "norm" or "embedding", or patterns of keys, such as "*.ff.*". An entry that matches
            nothing is refused. Biases and norms that a LoRA file changes are applied to the
            model's own parameters in both modes.
        fuse: False: one adapter named "customize" beside the base weights, which stay unchanged;
            your own adapters are not affected. True: into the base weights, summed in float32 and
            rounded once; a copy of each changed weight is kept on the CPU, so that unloading
            restores it bit for bit. It applies to ``concepts``, or without any to those that a
            dict of weights names; others keep their mode.
        merge: How to merge several concepts. "sum": the weighted sum of the updates. "fusion": in
            each layer, the least-squares update that reproduces each concept on its own inputs
            (:mod:`customize.core.merges.fusion`). It needs the recorded layer inputs of each
            concept, which training and :func:`record_inputs` store beside the concept; missing
            ones are recorded now, by drawing. "auto": fusion if every concept has recorded inputs,
            else the sum; also the sum for all concepts of one training run. "average",
            "truncate", "magnitude", "dare" and "ties": other methods of
            :mod:`customize.core.merges`, with default settings or, in a dict, with others:
            ``{"method": "ties", "density": 0.3}``. They merge all concepts jointly, so ``fuse``
            must be the same for all. Pruning is exact with ``fuse=True``; an adapter beside the
            weights approximates it at the sum of the ranks. None: unchanged, at first "auto". A
            single concept is not changed by merging; ``pipe.custom`` reports the method.
        attention: "auto": the fastest of the installed backends that support the device, the dtype
            and the widths of the heads, timed on CUDA and torch's own elsewhere. Or one of them:
            "native" (also "sdpa"), "xformers", "flash", "sage", or another of diffusers' names. It
            is first compared with attention in float64 on one call with the model's heads.
            ``pipe.custom`` reports the backend of each component. Your own attention processors,
            such as IP-Adapters', are kept and listed. Choose it after moving the pipeline to its
            device.
        memory: Memory budget, such as "8GB", "12GB", "16GB" or "24GB". Of decoding in tiles,
            offloading and float8 storage, the fastest combination that fits is applied, for one
            image of the default resolution; ``pipe.custom`` reports it. It places the models, so
            ``.to()`` is not needed. It stays when concepts are unloaded; load the pipeline anew to
            undo it. :func:`memory_plan` plans the loading of a model that is too large for this.
        library: Folder of any number of concepts and LoRAs, or a collection of the hub, by the part
            of its address after ``collections/``. From then on, each call attaches the concepts
            whose triggers its prompts and negative prompts contain, beside those loaded by name;
            they stay until a prompt contains others. A batch is drawn with the concepts of all its
            prompts. An ordinary LoRA has the trigger ``<name>``, which the model reads as the words
            that its file records, or as its name. A word that looks like a trigger and is neither
            one nor a token of the tokenizer is refused. A call without prompts, as with
            ``prompt_embeds``, changes nothing. ``unload_custom()`` removes the library.
        library_cache: Memory for concepts and merges of the library that are not attached, such as
            "2GB"; the least recently used ones are dropped first.

    Returns:
        ``pipe`` itself.

    Raises:
        ConfigError: A weight matches nothing or is not finite; the attention backend or the library
            does not exist; or the memory budget is too small, with the minimum that suffices.
        ConceptError: A concept cannot be read, was learned on another base, or its name or trigger
            is taken.
        PipelineError: The pipeline's family is unknown, its state does not allow the change, or it
            shares only some of the components with attached concepts; or the attention backend is
            not installed, does not support the model, or computes wrong values here.
    """
    from customize.core.precision import full_precision
    from customize.errors import ConfigError
    from customize.pipeline.attach import load
    from customize.pipeline.model_locks import lock_models
    from customize.pipeline.state import StageSetting
    from customize.stages.library_routing import LibrarySource

    sources = [item for item in concepts if not isinstance(item, StageSetting)]
    settings: list[StageSetting] = [item for item in concepts if isinstance(item, StageSetting)]
    for number, setting in enumerate(settings):
        name = type(setting).__name__
        if name in [type(earlier).__name__ for earlier in settings[:number]]:
            raise ConfigError(f"two {name} are given", fix="give one")
    if library is not None:
        settings.append(LibrarySource(library, library_cache))
    with lock_models(pipe), full_precision(tf32=True):
        load(
            pipe,
            sources,
            settings=settings,
            weights=weights,
            names=names,
            into=into,
            ignore=ignore,
            fuse=fuse,
            merge=merge,
            attention=attention,
            memory=memory,
        )
    wrap_calls(type(pipe))  # someone may have replaced `__call__` since the class was patched
    return pipe


def unload_custom(pipe: Pipeline, *names: str) -> Pipeline:
    """Detach concepts by name, or without names everything that :func:`load_custom` did.

    After the last concept is detached, the pipeline is bit for bit as before the first: weights,
    tokenizers, modules and class. Without names, a library and a ``Decor`` are dropped too, and
    attention gets its former processors and backends back. A memory plan stays, since the weights
    may not fit without it.

    Args:
        pipe: As for :func:`load_custom`.
        names: Names of attached concepts.

    Returns:
        ``pipe`` itself.

    Raises:
        ConfigError: A name is not attached; nothing changes.
        PipelineError: Fused weights were changed by other code since.
    """
    from customize.core.precision import full_precision
    from customize.pipeline.attach import unload
    from customize.pipeline.model_locks import lock_models

    with lock_models(pipe), full_precision(tf32=True):
        unload(pipe, names)
    note_unloaded(pipe)
    return pipe


def get_customization(pipe: Any) -> Customization:
    """Return what is attached to a pipeline; printed, it is a table with a row for each concept."""
    from customize.pipeline.report import report_customization

    return report_customization(pipe, load_stages())


def record_inputs(
    pipe: Any,
    concept: str | Path | Concept | Lora | LoraFile,
    prompts: Sequence[str] | None = None,
    words: str | None = None,
) -> LayerInputs:
    """Record a concept's layer inputs, as ``load_custom(merge="fusion")`` needs them.

    The pipeline draws each prompt in a few steps, with the base alone and with the concept alone;
    afterwards its state is restored. ``.save(path)`` writes the result. ``load_custom`` reads it
    beside the concept, at :func:`customize.concepts.input_statistics.layer_inputs_path`, where
    ``customize record`` writes it.

    Args:
        pipe: As for :func:`load_custom`, of the concept's base.
        concept: As for :func:`load_custom`.
        prompts: Prompts with ``{}`` for the concept's words; the base draws them with "a" and the
            class word. Default: a dozen, the caption of its training in varied places and clothes.
        words: Words that call the concept. Default: its trigger, or the words that a LoRA's file
            records.

    Raises:
        ConfigError: A prompt has no ``{}``, or is so long that the trigger is truncated; or the
            words of a LoRA are unknown.
        ConceptError: As for :func:`load_custom`.
        PipelineError: As for :func:`load_custom`.
    """
    from customize.core.precision import full_precision
    from customize.pipeline.model_locks import lock_models
    from customize.pipeline.record_inputs import record_inputs

    with lock_models(pipe), full_precision(tf32=True):
        return record_inputs(pipe, concept, prompts, words)


def memory_plan(
    memory: str,
    base: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[MemoryPlan, dict[str, Any]]:
    """Plan how to load a model so that it fits into memory, from its configurations alone.

    ::

        plan, loading = customize.memory_plan("12GB", base)
        pipe = DiffusionPipeline.from_pretrained(base, **loading).load_custom(memory="12GB")

    Beyond what ``load_custom(memory=)`` can do to a loaded pipeline, the plan may load models in 4
    bits, if bitsandbytes is installed and there is a CUDA device.

    Args:
        memory: Memory budget, such as "8GB", "12GB", "16GB" or "24GB".
        base: Folder written by ``save_pretrained``, or a hub id.
        dtype: dtype of the weights. Default: bfloat16.
        device: Type of the device that computes. Default: this machine's.

    Returns:
        The plan, and the keyword arguments for ``from_pretrained``.

    Raises:
        ConfigError: The memory budget is too small, with the minimum that suffices.
        PipelineError: The base does not exist, or its family is unknown.
    """
    from customize.base.meta_device import plan_base_memory

    return plan_base_memory(memory, base, dtype=dtype, device=device)


METHODS: dict[str, Any] = {
    "load_custom": load_custom,
    "unload_custom": unload_custom,
    "custom": property(get_customization),
}


def patch_pipelines() -> None:
    """Add these methods and the stages' arguments to diffusers' pipelines, now or on their import.

    May be called any number of times.
    """
    patch_when_imported(METHODS)
