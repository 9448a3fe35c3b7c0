"""Recorded layer inputs: statistics of the inputs of a concept's layers, for merges.

A record has the leading directions of the inputs of each adapted layer, while the model with the
concept draws pictures, and while the base draws the same prompts with the class word. It is a
separate file beside the concept or LoRA::

    concepts/rex/layer_inputs.safetensors       of a folder
    loras/tom.layer_inputs.safetensors          of loras/tom.safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customize.atomic import write_atomic
from customize.concepts.adapter import (
    ConceptUpdates,
    LayerFactors,
    match_to_model,
    saved_module_name,
)
from customize.concepts.caption_template import DEFAULT_CAPTION
from customize.concepts.io.data_files import safetensors_bytes
from customize.concepts.io.file_layout import LAYER_INPUTS_FILE
from customize.concepts.io.find_files import locate
from customize.concepts.io.input_statistics_file import HEADER, VERSION, read_input_statistics
from customize.concepts.types import describe_layer_counts
from customize.core.input_moment import InputMoment
from customize.errors import ConceptError, storage_error
from customize.families import Family
from customize.families.adaptable_layers import CONVOLUTIONS
from customize.families.pipeline_components import uncompiled
from customize.families.sampling import sample
from customize.safe_read import as_path, path_exists

#: Contexts of the prompts.
CONTEXTS = (
    "on a beach",
    "in a forest",
    "in a city",
    "in the snow",
    "in a room",
    "in space",
    "wearing a hat",
    "wearing glasses",
    "wearing a scarf",
)


def contexts_of(caption: str) -> tuple[str, ...]:
    """A caption such as "a photo of {}" in varied contexts, all different."""
    in_contexts = (f"{caption} {context}" for context in CONTEXTS)
    return tuple(dict.fromkeys((caption, "a picture of {}", *in_contexts, "a painting of {}")))


#: The prompts; {} is replaced by the concept's trigger words, and by its class word.
PROMPTS = contexts_of(DEFAULT_CAPTION)
#: Number of directions stored per layer.
DIRECTIONS = 32
STEPS = 8
GUIDANCE = 3.0
_BATCH_SIZE = 4  # pictures

Layers = Mapping[str, Sequence[str]]
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """The recorded layer inputs of a concept.

    Attributes:
        digest: :func:`digest_updates` of the concept's updates.
        concept: Component -> module name, as in files -> (n, in), float32: factor of the inputs'
            second moment, divided by its trace (:mod:`customize.core.merges.fusion`), with the
            concept.
        generic: The same of the base with the class word.
    """

    digest: str
    concept: LayerFactors
    generic: LayerFactors

    def __repr__(self) -> str:
        return f"LayerInputs({self.digest[:8]}; {describe_layer_counts(self.concept)})"

    def save(self, path: str | Path) -> Path:
        """Write the record atomically, replacing an older one.

        Raises:
            StorageError: If the file cannot be written.
        """
        path = as_path(path, "path")
        try:
            write_atomic(path, self.to_bytes())
        except OSError as error:
            raise storage_error(error, path) from error
        return path

    def to_bytes(self) -> bytes:
        """The content of the record's file; factors are stored in float16."""
        tensors: dict[str, Tensor] = {}
        shared: dict[str, str] = {}
        keys: dict[int, str] = {}
        for kind, factors in (("own", self.concept), ("generic", self.generic)):
            for component, layers in factors.items():
                for module, rows in layers.items():
                    key = f"{kind}.{component}.{module}"
                    # Layers with the same input share one factor.
                    if keys.setdefault(id(rows), key) != key:
                        shared[key] = keys[id(rows)]
                    else:
                        tensors[key] = rows.to(torch.float16)
        header = {"version": VERSION, "of": self.digest, "same": shared}
        return safetensors_bytes(tensors, {HEADER: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> LayerInputs:
        """Read and validate a record.

        Raises:
            ConceptError: If the file cannot be read, or is not a valid record.
        """
        digest, factors = read_input_statistics(as_path(path, "path"))
        return cls(digest, factors["own"], factors["generic"])


def layer_inputs_path(source: str | Path) -> Path:
    """The path of the record of a concept's folder, a LoRA file or a hub id.

    Raises:
        ConceptError: If the concept does not exist.
    """
    path = locate(source)
    return path / LAYER_INPUTS_FILE if path.is_dir() else path.with_suffix(f".{LAYER_INPUTS_FILE}")


def load_recorded_inputs(
    name: str, updates: ConceptUpdates, source: Path | None
) -> LayerInputs | None:
    """Load the record beside a concept; None if there is none.

    Args:
        name: Name of the concept, for errors.
        updates: Updates of the concept.
        source: The path that the concept was read from.

    Raises:
        ConceptError: If the record cannot be read, or is of other updates.
    """
    path = None if source is None else layer_inputs_path(source)
    if path is None or not path_exists(path):
        return None
    record = LayerInputs.load(path)
    if record.digest != digest_updates(updates):
        raise ConceptError(
            f"the record of layer inputs is of another version of {name}",
            where=path,
            fix="delete it, or record the inputs again: customize record",
        )
    for factors in (record.concept, record.generic):
        for component, layers in factors.items():
            for module, rows in layers.items():
                update = updates.get(component, {}).get(module)
                if update is not None and rows.shape[1] != update.shape[1]:
                    raise ConceptError(
                        f"the record has inputs of width {rows.shape[1]} for a layer of width "
                        f"{update.shape[1]}",
                        where=f"{path}: {component}.{module}",
                        fix="delete it, or record the inputs again: customize record",
                    )
    return record


def digest_updates(updates: ConceptUpdates) -> str:
    """A hash of updates: of their layers' names, scales and factors."""
    digest = hashlib.sha256()
    for component, layers in sorted(updates.items()):
        for module, update in sorted(layers.items()):
            digest.update(f"{component}.{module} {update.scale}\n".encode())
            for factor in (update.up, update.down):
                values = factor.detach().cpu().contiguous()
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def fill_prompts(words: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """Replace {} in prompts by words."""
    return [prompt.replace("{}", words) for prompt in prompts]


def generic_prompts(count: int = 64) -> list[str]:
    """Varied prompts: one or two things of many colours in many places.

    The lengths of the word lists are coprime, so the prompts differ.
    """

    def pick(words: Sequence[str], number: int) -> str:
        return words[number % len(words)]

    prompts = []
    for k in range(count):
        thing = f"a {pick(_COLOURS, k)} {pick(_THINGS, k)}{pick(_WORN, k)}"
        if k % 4 == 3:
            thing += f" and a {pick(_COLOURS, k + 3)} {pick(_THINGS, k + 5)}{pick(_WORN, k + 1)}"
        prompts.append(f"{pick(_OPENINGS, k)}{thing}{pick(_PLACES, k)}")
    return prompts


_OPENINGS = ("a photo of ", "a picture of ", "")
_THINGS = (
    *("dog", "cat", "car", "cup", "bird", "person", "robot", "house", "fish", "rabbit", "woman"),
    *("toy", "man"),
)
_COLOURS = (
    *("red", "blue", "green", "white", "black", "yellow", "striped", "brown", "pink", "small"),
    "spotted",
)
_WORN = ("", " wearing a hat", "", " wearing glasses", " wearing a scarf")
_PLACES = (
    *(" on a beach", " in a forest", " in a city", " in the snow", " in a room", " in space"),
    "",
)


def base_prompts(class_word: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """The prompts for the base: with the class word, or without one as many generic prompts."""
    if not class_word:
        return generic_prompts(len(prompts))
    return fill_prompts(f"a {class_word}", prompts)


def updated_layers(family: Family, updates: ConceptUpdates) -> Layers:
    """The layers with updates, by their names in the model.

    Returns:
        Component -> module names.
    """
    return {
        component: list(modules) for component, modules in match_to_model(updates, family).items()
    }


@torch.no_grad()
def record_layer_inputs(
    family: Family,
    layers: Layers,
    prompts: Sequence[str],
    shape: Sequence[int],
    *,
    encode: Encode | None = None,
    include_empty_prompt: bool = False,
    before_denoising: Callable[[], object] = lambda: None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> dict[str, dict[str, Tensor]]:
    """Draw pictures and record the inputs of layers.

    Args:
        family: The model with its attached adapters.
        layers: Component -> module names in the model of the layers to record.
        prompts: The prompts.
        shape: (channels, height, width) of the latents.
        encode: Prompts to conditions; None for the family's.
        include_empty_prompt: Whether inputs of the empty prompt, for guidance, are included.
        before_denoising: Called when all prompts are encoded.
        steps: Number of sampling steps.
        guidance: Guidance scale, as the pipeline defines it.
        autocast: Context of the encoders' and denoiser's calls.
        progress: Wraps the list of batches, for example to show progress.

    Returns:
        Component -> module name, as in files -> (n, in), float32. Layers that were not called, and
        convolutions of more than one pixel, are left out.
    """
    encode = encode or family.encode_prompts
    chunks = [prompts[first : first + _BATCH_SIZE] for first in range(0, len(prompts), _BATCH_SIZE)]
    with autocast():
        # Encoded beside another prompt: with layerwise embeddings, conditions are longer.
        empty = {name: rows[-1:] for name, rows in encode([*prompts[:1], ""]).items()}
    empty = family.unconditional(empty)
    with recorded_inputs(family, layers) as recorder:
        with autocast():
            if include_empty_prompt:
                encode([""])
            batches = [encode(chunk) for chunk in chunks]
        before_denoising()
        recorder.skip_first_half = family.is_guided(guidance) and not include_empty_prompt
        for number, conditions in enumerate(progress(batches)):
            first = number * _BATCH_SIZE
            sample(
                family,
                conditions,
                empty,
                shape,
                steps=steps,
                guidance=guidance,
                seeds=range(first, first + len(chunks[number])),
                autocast=autocast,
            )
            if not recorder.is_finite():  # the other pictures cannot change that
                break
    return recorder.factors(DIRECTIONS)


class InputRecorder:
    """Accumulates the second moments of layers' inputs.

    Attributes:
        skip_first_half: Whether the first half of each batch, of the empty prompt, is skipped.
    """

    def __init__(self) -> None:
        self.skip_first_half = False
        self._moments: dict[tuple[str, str], InputMoment] = {}
        # Layer -> the layer before it that reads the same tensor.
        self._shared: dict[tuple[str, str], tuple[str, str]] = {}
        self._last: tuple[tuple[str, str], Tensor] | None = None

    def record(self, layer: tuple[str, str], module: nn.Module, args: Sequence[Any]) -> None:
        """Record one call; a forward pre-hook of the layer."""
        inputs = args[0]
        if layer in self._shared:
            return
        if layer not in self._moments:
            if self._last is not None and self._last[1] is inputs:
                self._shared[layer] = self._last[0]
                return
            self._moments[layer] = InputMoment(_width(inputs, module), device=inputs.device)
        # Referenced, so that the next layer's input cannot have the same identity.
        self._last = (layer, inputs)
        recorded = inputs[inputs.shape[0] // 2 :] if self.skip_first_half else inputs
        self._moments[layer].add(_rows(recorded, module))

    def is_finite(self) -> bool:
        """Whether all inputs so far were finite."""
        return all(math.isfinite(moment.energy) for moment in self._moments.values())

    def factors(self, directions: int) -> dict[str, dict[str, Tensor]]:
        """The result of :func:`record_layer_inputs`.

        Args:
            directions: Number of directions per layer.
        """
        self._last = None
        factors: dict[str, dict[str, Tensor]] = {}
        recorded = {layer: moment.factor(directions) for layer, moment in self._moments.items()}
        for component, module in [*recorded, *self._shared]:
            source = self._shared.get((component, module), (component, module))
            name = saved_module_name(component, module)
            factors.setdefault(component, {})[name] = recorded[source]
        return factors


@contextmanager
def recorded_inputs(family: Family, layers: Layers) -> Iterator[InputRecorder]:
    """Record the inputs of layers inside the context."""
    recorder, handles = InputRecorder(), []
    try:
        for component, modules in layers.items():
            model = uncompiled(family.components[component])
            for module in modules:
                layer: Any = model.get_submodule(module)
                if _is_pointwise(getattr(layer, "base_layer", layer)):

                    def hook(module: nn.Module, args: Any, name: Any = (component, module)) -> None:
                        recorder.record(name, module, args)

                    handles.append(layer.register_forward_pre_hook(hook))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a layer reads one position at a time: linear, or a 1 x 1 convolution."""
    return not isinstance(layer, CONVOLUTIONS) or set(layer.kernel_size) == {1}


def _width(inputs: Tensor, module: nn.Module) -> int:
    return inputs.shape[1] if _is_convolution(module) else inputs.shape[-1]


def _rows(inputs: Tensor, module: nn.Module) -> Tensor:
    return inputs.movedim(1, -1) if _is_convolution(module) else inputs


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), CONVOLUTIONS)
