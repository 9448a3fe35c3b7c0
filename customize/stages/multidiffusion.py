"""Denoising with one prompt for each region of an image (MultiDiffusion, arXiv 2302.08113).

In every step the denoiser predicts the whole image once for each prompt, and the predictions are
blended by the regions' weights. So the words of a region do not affect other regions within a step;
between steps all regions see one another as parts of one image. At high noise levels, where the
layout is decided, a region is predicted in a window around it, as a picture of its own, and with
noise in place of the other regions (the paper's bootstrapping), so that its object is drawn inside
it. Models whose inputs cannot be cut have the noise alone.

Only the denoiser's inputs and outputs are changed, by hooks, so attention is unaffected.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from customize.core.region_weights import blend, region_window, stack_regions
from customize.errors import PipelineError
from customize.families import Family
from customize.families.denoiser_inputs import select_rows
from customize.families.pipeline_components import uncompiled
from customize.pipeline.call_scope import capture_call_scope
from customize.stages.prompt_rows import PromptRows, replace_rows

#: Bootstrapping ends at this noise level, where 1 is pure noise.
BOOTSTRAP_NOISE_LEVEL = 0.5


#: For each row of the denoiser's running call: the index of the prompt and the words of the region
#: that the row is drawn by, with None for the background; or None for rows of other prompts. None
#: outside of calls that are drawn by regions.
REGION_ROWS: ContextVar[list[tuple[int, str | None] | None] | None] = ContextVar(
    "customize_region_rows", default=None
)


@dataclass(frozen=True, eq=False)
class RegionalPrompt:
    """One prompt of a call, and the prompts that replace it.

    Attributes:
        prompt: As given to the pipeline.
        prompts: The background's prompt, then one for each region.
        weights: For each region ``(rows, columns) -> (rows, columns)``, in [0, 1].
        phrases: For each region the words that the caller named it by.
    """

    prompt: str
    prompts: tuple[str, ...]
    weights: tuple[Callable[[int, int], Tensor], ...]
    phrases: tuple[str, ...] = ()


@contextmanager
def denoise_by_regions(family: Family, prompts: Sequence[RegionalPrompt]) -> Iterator[None]:
    """Make the denoisers predict by regions where they are called with these prompts.

    Args:
        family: The models of the pipeline.
        prompts: One for each prompt of the call, in their order.

    Raises:
        PipelineError: The denoiser was not called with these prompts, because the pipeline encodes
            them in another way.
    """
    denoiser_keys = (family.denoiser_key, *family.other_denoisers)
    denoisers = [family.components.get(key) for key in denoiser_keys]
    regional = _RegionalDenoiser(family, prompts)
    with ExitStack() as stack:
        stack.callback(REGION_ROWS.reset, REGION_ROWS.set(None))
        for denoiser in denoisers:
            if denoiser is not None:
                # The last hook before the call, and the first one after it.
                before = denoiser.register_forward_pre_hook(
                    regional.before_forward, with_kwargs=True
                )
                after = denoiser.register_forward_hook(
                    regional.after_forward, with_kwargs=True, prepend=True
                )
                stack.callback(before.remove)
                stack.callback(after.remove)
        yield
    if not regional.has_matched:
        raise PipelineError(
            "the denoiser was never called with the encoded prompt, so regions= had no effect",
            where="regions",
            fix="leave out arguments that change how prompts are encoded, and steps that rewrite "
            "them",
        )


#: Rows and columns of a part of the latents.
Window = tuple[slice, slice]


@dataclass(frozen=True, eq=False)
class _Layer:
    """The contribution of one prompt to an image.

    Attributes:
        weights: (rows, columns), in [0, 1].
        prompt: The index of its prompt.
        is_background: Whether it is the background, not a region.
        source: The index of the call's prompt, and the region's words; None for the background.
        window: The part of the picture that a region is drawn in; None for all of it.
    """

    weights: Tensor
    prompt: int
    is_background: bool
    source: tuple[int, str | None]
    window: Window | None


@dataclass(eq=False)
class _Pass:
    """One pass of the denoiser.

    Attributes:
        layers: Row of the call -> its layer.
        window: The part of the picture that is predicted; None for all of it.
    """

    layers: dict[int, _Layer]
    window: Window | None = None


@dataclass(eq=False)
class _DenoiserCall:
    """One call of a denoiser.

    Attributes:
        arguments: Its arguments by name.
        batch: The number of rows of latents.
        texts_per_row: The number of text entries for each row.
        passes: The first one is the call itself, with all of its rows; further ones have only the
            rows with a layer.
        is_bootstrapping: Whether other regions are replaced by noise.
    """

    arguments: dict[str, Any]
    batch: int
    texts_per_row: int
    passes: list[_Pass]
    is_bootstrapping: bool


class _RegionalDenoiser:
    """The hooks of a denoiser during one call of a pipeline.

    Attributes:
        has_matched: Whether the denoiser was called with one of the prompts.
    """

    def __init__(self, family: Family, prompts: Sequence[RegionalPrompt]) -> None:
        self.family, self.prompts = family, prompts
        texts = dict.fromkeys(text for regional in prompts for text in regional.prompts)
        self.text_index = {text: index for index, text in enumerate(texts)}
        with torch.no_grad():
            self.conditions = family.encode_prompts(list(texts))
            # In a batch of the pipeline's size, so that rounding is the same.
            encoded = family.encode_prompts([regional.prompt for regional in prompts])
        inputs = [
            family.denoiser_kwargs({name: values[[row]] for name, values in encoded.items()})
            for row in range(len(prompts))
        ]
        self.has_matched = False
        self._in_this_call = capture_call_scope()
        self._text_argument = next(iter(inputs[0]))
        self._prompt_rows = PromptRows([kwargs[self._text_argument][0] for kwargs in inputs])
        self._running: list[_DenoiserCall | None] = []
        self._layers: dict[tuple[int, int], list[list[_Layer]]] = {}
        self._count = 0
        # With more input than output channels the latents contain other inputs, such as masks.
        config = family.denoiser.config
        self._can_bootstrap = config.get("out_channels") in (None, config.in_channels)

    def before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(uncompiled(module)).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        call = self._plan_passes(arguments) if self._in_this_call() else None
        self._running.append(call)
        if call is None:
            return None
        # Set until after_forward, or by a further call that an error in this one leads to.
        REGION_ROWS.set(_rows_of_pass(call, 0))
        return (), self._pass_arguments(call, 0)

    def after_forward(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._running.pop()
        if call is None:
            return None
        # `forward` may be replaced by hooks of others; calling the module would run ours again.
        outputs = [output]
        for index in range(1, len(call.passes)):
            REGION_ROWS.set(_rows_of_pass(call, index))
            outputs.append(module.forward(**self._pass_arguments(call, index)))
        REGION_ROWS.set(None)
        return self._blend_outputs(call, outputs)

    def _plan_passes(self, arguments: dict[str, Any]) -> _DenoiserCall | None:
        """Plan the passes of one call; return None if it has none of the prompts."""
        texts = arguments[self._text_argument]
        batch = len(arguments[self.family.latents_argument])
        texts_per_row = max(1, len(texts) // batch)
        prompts = self._prompt_rows.match(texts, texts_per_row)
        if not prompts:
            return None
        self.has_matched, self._count = True, self._count + 1
        grid = self.family.latent_grid(arguments)
        if grid not in self._layers:
            self._layers[grid] = [
                self._visible_layers(number, *grid) for number in range(len(self.prompts))
            ]
        layers = self._layers[grid]
        is_noisy = self.family.noise_level(arguments) > BOOTSTRAP_NOISE_LEVEL
        is_bootstrapping = self._can_bootstrap and is_noisy
        passes: dict[tuple[Any, ...], _Pass] = {(0, None): _Pass({})}
        for row, prompt in prompts.items():
            for index, layer in enumerate(layers[prompt]):
                window = layer.window if is_bootstrapping else None
                if window and self.family.window_arguments(arguments, *window) is None:
                    window = None
                sides = window and tuple((side.start, side.stop) for side in window)
                passes.setdefault((index, sides), _Pass({}, window)).layers[row] = layer
        return _DenoiserCall(arguments, batch, texts_per_row, [*passes.values()], is_bootstrapping)

    def _visible_layers(self, number: int, rows: int, columns: int) -> list[_Layer]:
        prompt = self.prompts[number]
        phrases: tuple[str | None, ...] = (None, *prompt.phrases)
        weights = stack_regions([weight(rows, columns) for weight in prompt.weights])
        return [
            _Layer(
                weight,
                self.text_index[text],
                index == 0,
                (number, phrases[index]),
                self._window(weight) if index else None,
            )
            for index, (weight, text) in enumerate(zip(weights, prompt.prompts, strict=True))
            if bool(weight.any())
        ]

    def _window(self, weights: Tensor) -> Window | None:
        window = region_window(weights, self.family.window_multiple)
        whole = tuple(slice(0, cells) for cells in weights.shape)
        return None if window == whole else window

    def _pass_arguments(self, call: _DenoiserCall, index: int) -> dict[str, Any]:
        """Return the denoiser's arguments in one pass."""
        layers, window = call.passes[index].layers, call.passes[index].window
        batch, count = call.batch, call.texts_per_row
        # Copies, because some denoisers pop entries of dicts in their arguments.
        arguments = {k: dict(v) if isinstance(v, dict) else v for k, v in call.arguments.items()}
        rows = list(layers)
        if not rows:
            return arguments
        if index and len(rows) < batch:
            lists = {
                name: [arguments[name][row] for row in rows] for name in self.family.list_arguments
            }
            entries_per_row = {batch * count: count, batch: 1}
            arguments = select_rows(arguments, rows, entries_per_row) | lists
            rows, batch = list(range(len(rows))), len(rows)
        name = self.family.latents_argument
        if call.is_bootstrapping:
            latents = list(arguments[name])
            for row, layer in zip(rows, layers.values(), strict=True):
                if not layer.is_background:
                    latents[row] = self._replace_outside(latents[row], layer.weights)
            is_tensor = isinstance(arguments[name], Tensor)
            arguments[name] = torch.stack(latents) if is_tensor else latents
        device = arguments[name][0].device
        texts = [layer.prompt for layer in layers.values() for _ in range(count)]
        conditions = {name: values[texts].to(device) for name, values in self.conditions.items()}
        entries = [row * count + k for row in rows for k in range(count)]
        replaced = replace_rows(
            arguments,
            self.family.denoiser_kwargs(conditions),
            entries,
            replaces_all=len(rows) == batch,
        )
        arguments |= replaced
        if window is None:
            return arguments
        part = self.family.window_arguments(arguments, *window)
        assert part is not None  # or the pass has no window
        return part

    def _replace_outside(self, latents: Tensor, weights: Tensor) -> Tensor:
        """Replace latents outside a region by noise of the same mean and deviation."""
        is_outside = weights < 0.5 * weights.max()
        is_outside = self.family.broadcast_weights(is_outside.to(latents.device), latents)
        # The same noise for all rows, so that an image does not depend on its batch.
        generator = torch.Generator().manual_seed(self._count)
        noise = torch.randn(latents.shape, generator=generator, device="cpu", dtype=torch.float32)
        noise = noise.to(latents) * latents.std() + latents.mean()
        return torch.where(is_outside, noise, latents)

    def _blend_outputs(self, call: _DenoiserCall, outputs: Sequence[Any]) -> Any:
        """Blend the predictions of all passes into the output of the call."""
        sample = outputs[0][0]
        rows = list(sample.unbind()) if isinstance(sample, Tensor) else list(sample)
        contributions: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for index, (each, output) in enumerate(zip(call.passes, outputs, strict=True)):
            has_all_rows = index == 0 or len(each.layers) == call.batch
            for position, (row, layer) in enumerate(each.layers.items()):
                prediction = output[0][row if has_all_rows else position]
                if each.window is not None:  # the weights are 0 elsewhere
                    whole = torch.zeros_like(rows[row])
                    whole[..., each.window[0], each.window[1]] = prediction
                    prediction = whole
                weights = self.family.broadcast_weights(
                    layer.weights.to(prediction.device), prediction
                )
                contributions.setdefault(row, []).append((prediction, weights))
        for row, pairs in contributions.items():
            rows[row] = blend(*zip(*pairs, strict=True))
        blended = torch.stack(rows) if isinstance(sample, Tensor) else rows
        output = outputs[0]
        if isinstance(output, tuple):
            return (blended, *output[1:])
        return dataclasses.replace(output, **{next(iter(output.keys())): blended})


def _rows_of_pass(call: _DenoiserCall, index: int) -> list[tuple[int, str | None] | None]:
    """Return the value of :data:`REGION_ROWS` in one pass."""
    layers = call.passes[index].layers
    has_all_rows = index == 0 or len(layers) == call.batch
    rows = range(call.batch) if has_all_rows else layers
    return [layers[row].source if row in layers else None for row in rows]
