"""The public functions, which :mod:`customize.api.patch_diffusers` makes methods of pipelines.

Nothing heavy is imported here.
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

Pipeline = TypeVar("Pipeline")


def load_custom(
    pipe: Pipeline,
    *concepts: str | Path | Concept | Lora | LoraFile | Decor,
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
    """Attach learned concepts to a pipeline, or change the weights of those attached.

    Also, with or without concepts: choose its attention kernel, and fit it into memory.

    All concepts of a pipeline are merged: by their weighted sum, exactly, by fusion, which keeps
    each as it is alone, or by another method. Their trigger words, such as ``<rex>``, then work in
    every prompt. Calling it again adds to what is there. Everything is checked before anything
    changes: after an error the pipeline is bit for bit what it was.

    A pipeline made from this one's components (``from_pipe``, ``Other(**pipe.components)``) shares
    its models and tokenizers and so its concepts; loading or unloading on either acts on both. One
    that shares only some of them is refused while concepts are attached to these. A text encoder
    that is freed or replaced meanwhile is kept until they are unloaded.

    Calls of every pipeline take ``regions=`` as well: a dict from words of the prompt to the box
    (left, top, right, bottom, as shares of the picture) or the mask in which they are to act; and
    ``avoid=``, what they are to be cleaned of.

    In several threads it waits until no call uses the models, and calls wait for it.

    Args:
        pipe: A standard or modular diffusers pipeline of a known family, on any device, in any
            floating dtype, with model, sequential or group offloading on or off.
        concepts: Folders or single ``.safetensors`` files, hub ids, or Concept objects. One that
            is attached already is refused unless it is identical; then only its weight and mode
            change. An ordinary LoRA file, by the keys of diffusers, peft, kohya, ComfyUI or
            LyCORIS, is a concept without a trigger; it goes by its file's name, and is refused
            unless every key of it is used. Beside them one ``customize.Decor(...)``, which is no
            concept: what all calls clean their prompts of, and how, in place of the one before.
        weights: One for each of ``concepts``, or a dict from concept name to weight, which may
            also name concepts that are attached already. Finite; left out, a new concept gets 1.0
            and an attached one keeps its own. In place of a number a dict by component and block,
            as diffusers' ``set_adapters`` takes it: ``{"text_encoder": 0.5, "unet": {"down": 0.8,
            "up": {"block_1": [0.4, 0.8, 1.0]}}}``, blocks alone are the denoiser's, and what is not
            named has 1.0 (:mod:`customize.concepts.merge.component_weights`). Where it is 0 the
            concept is as if without these layers. Tokens are not scaled.
        names: One for each of ``concepts``, or None where it keeps its own. The concept then goes
            by that name and by the trigger ``<name>``; it tells apart what is called alike.
        into: For LoRA files on a model with several denoisers (Wan 2.2 14B), whose keys do not say
            which one they are for: "transformer_2", or ("transformer", "transformer_2") for both,
            as for one of Wan 2.1; with several files a list with such an entry, or None, for each.
            Left out, keys that begin with a denoiser's name decide, then the file's name
            (``x_high_noise``, ``x_low_noise``), else the first denoiser takes it, with a warning.
        ignore: parts of what is loaded to leave out, never done unasked: components, such as
            "text_encoder_2", "bias", "norm" or "embedding", or patterns of keys, such as "*.ff.*".
            One that leaves nothing out is refused. Biases and norms that a LoRA file changes are
            otherwise applied, in the model's own parameters in both modes.
        fuse: False: one adapter named "customize" beside the base weights, which stay untouched;
            adapters of your own stay as they are. True: into the base weights, summed in float32
            and rounded once; a copy of each touched weight is kept on the CPU, so that unloading
            gives back the same bits. Holds for the ``concepts`` given, or without any for those
            that a dict of weights names; others keep their mode.
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
        attention: "auto": of the backends that are installed and fit the device, the dtype and the
            widths of the heads, the fastest; on CUDA they are timed here, elsewhere it is torch's
            own. Or one of them: "native" ("sdpa" is the same), "xformers", "flash", "sage", or
            any other of diffusers' names. It is first compared with attention in float64 on one
            call with the model's heads. ``pipe.custom`` tells what took effect where. Attention
            processors of your own, IP-Adapters' among them, stay and are listed as kept. Choose
            it after moving the pipeline to its device.
        memory: such as "8GB", "12GB", "16GB" or "24GB": of the ways to hold the model in so much
            (decoding in tiles, offloading, float8 storage), the fastest that fits, for one picture
            of the default resolution; ``pipe.custom`` tells which. It places the models: ``.to()``
            is not needed. It stays when concepts are unloaded; load the pipeline anew to undo it.
            :func:`memory_plan` also tells how to load a model that is too large for that.
        library: A folder of any number of concepts and LoRAs, or a collection of the hub's, by what
            its address has after ``collections/``. From then on, each call's prompts, the negative
            ones too, are read for triggers, and the concepts that they name are attached, beside
            those that were loaded by name; they stay until a prompt names others. All that the
            prompts of a batch name are attached to the whole batch. A LoRA from elsewhere is called
            ``<name>``, in whose place the model reads the words that its file names, or its name.
            What looks like a trigger and is none, nor a token of the tokenizer's, is refused. A
            call without prompts, as with ``prompt_embeds``, leaves what is attached.
            ``unload_custom()`` takes the library away.
        library_cache: such as "2GB": how much of the library is kept in memory beside what is
            attached, as it was read and as it was merged; the least recently used goes first.

    Returns:
        ``pipe`` itself.

    Raises:
        ConfigError: weights that fit nothing or are not finite; no such attention backend; too
            little memory for the model, telling the least that would do; no such library.
        ConceptError: a concept that cannot be read, is of another base, or whose name or trigger
            is taken.
        PipelineError: the pipeline's family is unknown, or its state does not allow it, or it
            shares only some of the parts that concepts are attached to; or the attention backend
            is not installed, does not fit, or computes something else here.
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
    """Detach concepts by name, or all of them where none is named.

    After the last one the pipeline is what it was before the first: weights, tokenizers, modules
    and class, bit for bit. Where none is named, attention gets its former processors and backends
    back, too. What ``memory=`` did stays: the weights need not fit any more without it.

    Returns:
        ``pipe`` itself.

    Raises:
        ConfigError: a name that is not attached; nothing has changed then.
        PipelineError: fused weights were changed by someone else since.
    """
    from customize.core.precision import full_precision
    from customize.pipeline.attach import unload
    from customize.pipeline.model_locks import lock_models

    with lock_models(pipe), full_precision(tf32=True):
        unload(pipe, names)
    note_unloaded(pipe)
    return pipe


def get_customization(pipe: Any) -> Customization:
    """What is attached to a pipeline: printed, it is a table with a row for each concept."""
    from customize.pipeline.report import report_customization

    return report_customization(pipe, load_stages())


def record_inputs(
    pipe: Any,
    concept: str | Path | Concept | Lora | LoraFile,
    prompts: Sequence[str] | None = None,
    words: str | None = None,
) -> LayerInputs:
    """Record what a concept's layers read while it is drawn, for ``load_custom(merge="fusion")``.

    The pipeline draws each prompt in a few steps, by itself and with the concept alone, and is
    afterwards as it was. ``.save(path)`` writes the record; beside the concept, where
    ``load_custom`` finds it, is :func:`customize.concepts.input_statistics.layer_inputs_path`, and
    ``customize record`` puts it there.

    Args:
        pipe: as for :func:`load_custom`, of the concept's base.
        concept: as for :func:`load_custom`.
        prompts: each with ``{}`` for the concept's words, and in the base for "a" and its class
            word. None: a dozen of places and clothes.
        words: what calls the concept; None: its trigger, or what a LoRA's file names.

    Raises:
        ConfigError: a prompt without ``{}``, or so long that the trigger in it is not read; or a
            LoRA that says no words of its own.
        ConceptError, PipelineError: as :func:`load_custom`.
    """
    from customize.core.precision import full_precision
    from customize.pipeline import record_inputs as recording
    from customize.pipeline.model_locks import lock_models

    with lock_models(pipe), full_precision(tf32=True):
        return recording.record_inputs(pipe, concept, prompts, words)


def memory_plan(
    memory: str,
    base: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> tuple[MemoryPlan, dict[str, Any]]:
    """How to load a model so that it fits into memory, worked out from its configurations.

    ::

        plan, loading = customize.memory_plan("12GB", base)
        pipe = DiffusionPipeline.from_pretrained(base, **loading).load_custom(memory="12GB")

    Beside what ``load_custom(memory=)`` can do to a loaded pipeline, it may load models in 4 bits,
    where bitsandbytes is installed and there is a CUDA device.

    Args:
        memory: such as "8GB", "12GB", "16GB" or "24GB".
        base: A folder as ``save_pretrained`` writes it, or a hub id.
        dtype: Of the weights; None for bfloat16.
        device: The type of the device that will compute; None for this machine's.

    Returns:
        The plan, and the keyword arguments for ``from_pretrained``.

    Raises:
        ConfigError: too little memory for the model, telling the least that would do.
        PipelineError: the base is not there, or of no known family.
    """
    from customize.base.meta_device import plan_base_memory

    return plan_base_memory(memory, base, dtype=dtype, device=device)


METHODS: dict[str, Any] = {
    "load_custom": load_custom,
    "unload_custom": unload_custom,
    "custom": property(get_customization),
}


def patch_pipelines() -> None:
    """Give diffusers' pipelines these methods, and their calls the stages, now or when they are
    imported. May be called any number of times."""
    patch_when_imported(METHODS)
