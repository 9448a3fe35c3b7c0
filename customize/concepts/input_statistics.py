"""What a concept's layers read while it is drawn: recorded once, for merges that need to know.

A record has, for each layer that the concept changes, the leading directions of its inputs, while
the concept is drawn, and while the base draws the same prompts with the class word. It lies beside
the concept, and is no part of it: a LoRA from anywhere can have one::

    concepts/rex/layer_inputs.safetensors       of a folder
    loras/tom.layer_inputs.safetensors          of loras/tom.safetensors
"""

from __future__ import annotations

import hashlib
import json
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
from customize.safe_read import path_exists

#: What things may be in, or wear.
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
#: What is drawn, with the concept's words, and with its class word, in the place of {}.
PROMPTS = (
    "a photo of {}",
    "a picture of {}",
    *(f"a photo of {{}} {context}" for context in CONTEXTS),
    "a painting of {}",
)
#: Directions that are kept of a layer's inputs.
DIRECTIONS = 32
STEPS = 8
GUIDANCE = 3.0
_TOGETHER = 4  # pictures drawn at a time

Layers = Mapping[str, Sequence[str]]
Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """A record.

    Attributes:
        of: :func:`digest_updates` of what was recorded.
        own: component -> module, under the names used in files -> (n, in), float32: the factor of
            the second moment of the inputs over its trace; see :mod:`customize.core.merges.fusion`.
        generic: the same of the base and the class word.
    """

    digest: str
    concept: LayerFactors
    generic: LayerFactors

    def __repr__(self) -> str:
        return f"LayerInputs(of {self.digest[:8]}; {describe_layer_counts(self.concept)})"

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all, over an older one.

        Raises:
            StorageError: it cannot be written.
        """
        path = Path(path)
        try:
            write_atomic(path, self.to_bytes())
        except OSError as error:
            raise storage_error(error, path) from error
        return path

    def to_bytes(self) -> bytes:
        """The content of its file."""
        tensors: dict[str, Tensor] = {}
        same: dict[str, str] = {}
        keys: dict[int, str] = {}
        for kind, factors in (("own", self.concept), ("generic", self.generic)):
            for component, layers in factors.items():
                for module, rows in layers.items():
                    key = f"{kind}.{component}.{module}"
                    # Layers that read the same tensor have one factor.
                    if keys.setdefault(id(rows), key) != key:
                        same[key] = keys[id(rows)]
                    else:
                        tensors[key] = rows.to(torch.float16)
        header = {"version": VERSION, "of": self.digest, "same": same}
        return safetensors_bytes(tensors, {HEADER: json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> LayerInputs:
        """Read a record.

        Raises:
            ConceptError: the file cannot be read, or is not a valid record.
        """
        of, found = read_input_statistics(Path(path))
        return cls(of, found["own"], found["generic"])


def layer_inputs_path(source: str | Path) -> Path:
    """Where the record of a concept's folder, a LoRA's file or a hub id lies.

    Raises:
        ConceptError: there is no such concept.
    """
    path = locate(source)
    return path / LAYER_INPUTS_FILE if path.is_dir() else path.with_suffix(f".{LAYER_INPUTS_FILE}")


def load_recorded_inputs(
    name: str, products: ConceptUpdates, source: Path | None
) -> LayerInputs | None:
    """The record that lies beside a concept; None where there is none.

    Args:
        name: of the concept, for messages.
        source: what the concept was read from.

    Raises:
        ConceptError: it cannot be read, or is not of these updates.
    """
    path = None if source is None else layer_inputs_path(source)
    if path is None or not path_exists(path):
        return None
    found = LayerInputs.load(path)
    if found.digest != digest_updates(products):
        raise ConceptError(
            f"the record of layer inputs is not of {name} as it is now",
            where=path,
            fix="delete it, or record it again: customize record",
        )
    for factors in (found.concept, found.generic):
        for component, layers in factors.items():
            for module, rows in layers.items():
                update = products.get(component, {}).get(module)
                if update is not None and rows.shape[1] != update.shape[1]:
                    raise ConceptError(
                        f"the record has inputs of width {rows.shape[1]} of a layer of width "
                        f"{update.shape[1]}",
                        where=f"{path}: {component}.{module}",
                        fix="delete it, or record it again: customize record",
                    )
    return found


def digest_updates(products: ConceptUpdates) -> str:
    """A name for some updates, by the bytes of their factors."""
    digest = hashlib.sha256()
    for component, updates in sorted(products.items()):
        for module, update in sorted(updates.items()):
            digest.update(f"{component}.{module} {update.scale}\n".encode())
            for factor in (update.up, update.down):
                plain = factor.detach().cpu().contiguous()
                digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def fill_prompts(words: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    """The prompts with words in the place of {}."""
    return [prompt.replace("{}", words) for prompt in prompts]


def generic_prompts(count: int = 64) -> list[str]:
    """What prompts of all kinds share: things of all colours in many places, by one and by two.

    The lists have lengths without a common divisor, so that each prompt is another one.
    """

    def pick(words: Sequence[str], number: int) -> str:
        return words[number % len(words)]

    found = []
    for k in range(count):
        thing = f"a {pick(_COLOURS, k)} {pick(_THINGS, k)}{pick(_WORN, k)}"
        if k % 4 == 3:
            thing += f" and a {pick(_COLOURS, k + 3)} {pick(_THINGS, k + 5)}{pick(_WORN, k + 1)}"
        found.append(f"{pick(_OPENINGS, k)}{thing}{pick(_PLACES, k)}")
    return found


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
    """What the base draws beside a concept: the prompts with its class word, or where it names
    none, as many of all kinds."""
    if not class_word:
        return generic_prompts(len(prompts))
    return fill_prompts(f"a {class_word}", prompts)


def updated_layers(family: Family, products: ConceptUpdates) -> Layers:
    """The layers that updates change, by the model's own names."""
    return {
        component: list(updates) for component, updates in match_to_model(products, family).items()
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
    """Draw, and record what the layers read.

    Args:
        family: with whatever is attached to it.
        layers: component -> the layers to record, by the model's names.
        prompts: what is drawn; see :func:`fill_prompts`.
        shape: (channels, height, width) of latents.
        encode: prompts to conditions; None: the family's.
        empty_counts: whether inputs of the empty prompt, which guidance leads away from, count too.
        ready: called when all prompts are encoded, before the denoiser is.
        track: goes through what is drawn, and may show how far that is.
        steps, guidance, autocast: as :func:`customize.families.sampling.sample`.

    Returns:
        component -> module, under the names used in files -> (n, in). Layers that read nothing, or
        are convolutions of more than a pixel, are left out.
    """
    encode = encode or family.encode_prompts
    chunks = [prompts[first : first + _TOGETHER] for first in range(0, len(prompts), _TOGETHER)]
    with autocast():
        # Together with another, as tokens with an embedding for each layer make conditions longer.
        empty = {name: rows[-1:] for name, rows in encode([*prompts[:1], ""]).items()}
    empty = family.unconditional(empty)
    with recorded_inputs(family, layers) as watch:
        with autocast():
            if include_empty_prompt:
                encode([""])
            asked = [encode(chunk) for chunk in chunks]
        before_denoising()
        watch.skip_first_half = family.is_guided(guidance) and not include_empty_prompt
        for number, conditions in enumerate(progress(asked)):
            first = number * _TOGETHER
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
    return watch.factors(DIRECTIONS)


class InputRecorder:
    """Counts the inputs of layers.

    Attributes:
        halved: whether the first half of each batch is of the empty prompt.
    """

    def __init__(self) -> None:
        self.skip_first_half = False
        self._moments: dict[tuple[str, str], InputMoment] = {}
        # A layer that reads the very tensor that the one before has read: the one before.
        self._same: dict[tuple[str, str], tuple[str, str]] = {}
        self._last: tuple[tuple[str, str], Tensor] | None = None

    def record(self, layer: tuple[str, str], module: nn.Module, args: Sequence[Any]) -> None:
        """A pre-hook of the layer."""
        inputs = args[0]
        if layer in self._same:
            return
        if layer not in self._moments:
            if self._last is not None and self._last[1] is inputs:
                self._same[layer] = self._last[0]
                return
            self._moments[layer] = InputMoment(_width(inputs, module), device=inputs.device)
        # Held, so that the next layer's input cannot be mistaken for this one.
        self._last = (layer, inputs)
        describe_layer_counts = inputs[inputs.shape[0] // 2 :] if self.skip_first_half else inputs
        self._moments[layer].add(_rows(describe_layer_counts, module))

    def factors(self, directions: int) -> dict[str, dict[str, Tensor]]:
        """What :func:`record_layer_inputs` returns."""
        self._last = None
        found: dict[str, dict[str, Tensor]] = {}
        whole = {layer: moment.factor(directions) for layer, moment in self._moments.items()}
        for component, module in [*whole, *self._same]:
            leader = self._same.get((component, module), (component, module))
            found.setdefault(component, {})[saved_module_name(component, module)] = whole[leader]
        return found


@contextmanager
def recorded_inputs(family: Family, layers: Layers) -> Iterator[InputRecorder]:
    """Within it, the inputs of all these layers are counted."""
    watch, handles = InputRecorder(), []
    try:
        for component, modules in layers.items():
            model = uncompiled(family.components[component])
            for module in modules:
                layer: Any = model.get_submodule(module)
                if _is_plain(getattr(layer, "base_layer", layer)):

                    def hook(
                        module: nn.Module, args: Any, place: Any = (component, module)
                    ) -> None:
                        watch.record(place, module, args)

                    handles.append(layer.register_forward_pre_hook(hook))
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer reads one position at a time."""
    return not isinstance(layer, CONVOLUTIONS) or set(layer.kernel_size) == {1}


def _width(inputs: Tensor, module: nn.Module) -> int:
    return inputs.shape[1] if _is_convolution(module) else inputs.shape[-1]


def _rows(inputs: Tensor, module: nn.Module) -> Tensor:
    return inputs.movedim(1, -1) if _is_convolution(module) else inputs


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", module), CONVOLUTIONS)
