"""What the seams of all denoisers share: reading reference tokens, and LoRA.

The denoiser only references the adapter and never registers its modules, so moving or saving the
denoiser leaves the adapter alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from customize.families import Family
from customize.families.pipeline_components import is_compiled, uncompiled
from customize.references.adapter import AttentionLayers, ReferenceAdapter
from customize.references.avoided_values import AvoidedText, TextValues

#: Number of different sets of tokens whose keys and values are kept.
MAX_KEPT = 128

#: Scale of the references, for all layers or as a function of a module's name.
Scale = float | Callable[[str], float]


@dataclass(frozen=True, eq=False)
class RowTokens:
    """The reference tokens of one call of a denoiser.

    Attributes:
        tokens: (rows, num_tokens, width), a row for each row of the latents.
        scale: (rows,), factor of each row's scale, on the tokens' device; None: 1 for all.
        avoided: What is removed from the rows' values, on the tokens' device; None: nothing.
            Seams without values of text (:class:`~customize.references.seams.Seam`) ignore it.
    """

    tokens: Tensor
    scale: Tensor | None = None
    avoided: AvoidedText | None = None


#: Arguments of a call of the denoiser, by name -> the tokens of its rows. It should return one
#: object for calls with the same tokens, whose keys and values are then computed once.
RowSelector = Callable[[Mapping[str, Any]], RowTokens]


class Attachment:
    """An adapter that is attached to a denoiser.

    Args:
        denoiser: The denoiser that is called; may be compiled.
        insert: ``insert(arguments, tokens)`` returns a call's arguments with tokens.

    Attributes:
        current: The tokens of the denoiser's latest call.
        value_projections: The projections of tokens to values that avoided content is removed from.
    """

    def __init__(
        self, denoiser: Any, insert: Callable[[dict[str, Any], Tensor], dict[str, Any]]
    ) -> None:
        self.current: RowTokens | None = None
        self.value_projections: list[ReferenceProjection] = []
        self._kept: dict[RowTokens, dict[nn.Module, Tensor]] = {}
        self._denoiser, self._insert = denoiser, insert
        forward = inspect.signature(type(uncompiled(denoiser)).forward)
        self._names = list(forward.parameters)[1:]

    @contextmanager
    def condition(self, tokens: Tensor | RowSelector) -> Iterator[None]:
        """Give tokens to all calls of the denoiser.

        Gradients reach the tokens. Without gradients, keys and values are computed once, and kept
        until the end.

        Args:
            tokens: (rows, num_tokens, width), a row for each row of the latents; or a function of
                a call's arguments.
        """
        source = RowTokens(tokens) if isinstance(tokens, Tensor) else tokens
        # `forward` rather than a hook: passes of other code that call it directly are included.
        denoiser, before = self._denoiser, vars(self._denoiser).get("forward")
        call, is_traced = denoiser.forward, is_compiled(denoiser)

        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(self._names, args, strict=False)) | kwargs
            current = source if isinstance(source, RowTokens) else source(arguments)
            self.current = current
            if is_traced:
                for projection in self.value_projections:
                    projection.compute_before_tracing(current)
            return call(**self._insert(arguments, current.tokens))

        denoiser.forward = forward
        try:
            yield
        finally:
            self.current = None
            self._kept.clear()
            # Hooks that were attached meanwhile have already removed it.
            if vars(denoiser).get("forward") is forward:
                if before is None:
                    del denoiser.forward
                else:
                    denoiser.forward = before

    def keep(
        self, tokens: RowTokens, projection: nn.Module, compute: Callable[[], Tensor]
    ) -> Tensor:
        """Return the keys or values of tokens in one layer, which are computed at their first use.

        Args:
            tokens: The tokens.
            projection: The layer's module.
            compute: Computes (rows, num_tokens, out).
        """
        if tokens not in self._kept and len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        projected = self._kept.setdefault(tokens, {})
        if projection not in projected:
            projected[projection] = compute()
        return projected[projection]


class ReferenceProjection(nn.Module):
    """The keys or values of reference tokens in one attention layer.

    Args:
        linear: The adapter's projection.
        attachment: Where the tokens are read.
        scale: Factor of the result, for values.
        is_value: Whether rows are scaled. Attention is linear in its values, so scaling them
            scales its output.
        text_values: For values, the base's values of text, whose directions avoided words have.
            None: avoided words change nothing.
    """

    def __init__(
        self,
        linear: nn.Module,
        attachment: Attachment,
        scale: float = 1.0,
        *,
        is_value: bool,
        text_values: TextValues | None = None,
    ) -> None:
        super().__init__()
        self._unregistered = (linear, attachment, text_values)
        self._scale, self._is_value = scale, is_value
        self._computed: Tensor | None = None
        if text_values is not None:
            attachment.value_projections.append(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Project (rows, ..., width) to (rows, ..., out)."""
        attachment = self._unregistered[1]
        current = attachment.current
        if torch.compiler.is_compiling() and self._computed is not None:
            return repeat_rows(self._computed, tokens).reshape(*tokens.shape[:-1], -1)
        if current is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._project(tokens, current)
        # Motion models repeat the tokens for each frame in every call, so what is kept is found by
        # the tokens that the denoiser was given.
        projected = attachment.keep(
            current, self, lambda: self._project(current.tokens.to(tokens), current)
        )
        return repeat_rows(projected, tokens).reshape(*tokens.shape[:-1], -1)

    def compute_before_tracing(self, current: RowTokens) -> None:
        """Compute the values of tokens with avoided words; a compiled denoiser then reads them."""
        if current.avoided is None:
            self._computed = None
            return
        attachment = self._unregistered[1]
        self._computed = attachment.keep(
            current, self, lambda: self._project(current.tokens, current)
        )

    def _project(self, tokens: Tensor, current: RowTokens | None) -> Tensor:
        linear: Any = self._unregistered[0]
        projected = linear(tokens.to(linear.weight.device, linear.weight.dtype)).to(tokens)
        if not self._is_value:
            return projected
        text_values = self._unregistered[2]
        if current is not None and current.avoided is not None and text_values is not None:
            directions = text_values.directions(current.avoided.words.to(tokens))
            projected = text_values.remove(
                projected, repeat_rows(directions, projected), current.avoided.strength
            )
        if self._scale != 1.0:
            projected = self._scale * projected
        if current is None or current.scale is None:
            return projected
        return projected * per_row(current.scale, projected)


class AdaptedProjection(nn.Module):
    """A projection of the denoiser with a LoRA of the adapter.

    Args:
        base_layer: The denoiser's module, which is unchanged.
        update: The LoRA.
        attachment: Where the rows' scales are read.
        scale: Factor of the update. It and a row's scale are clamped to at most 1.
    """

    def __init__(
        self, base_layer: nn.Module, update: nn.Module, attachment: Attachment, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._unregistered = (update, attachment)
        self._scale = min(scale, 1.0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Project (rows, ..., in) to (rows, ..., out)."""
        update, attachment = self._unregistered
        output: Tensor = self.base_layer(x, *args, **kwargs)
        change = update(x).to(output.dtype)
        if self._scale != 1.0:
            change = self._scale * change
        current = attachment.current
        if current is not None and current.scale is not None:
            change = change * per_row(current.scale.clamp(max=1.0), change)
        return output + change

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as the weight, whose dtype some code reads
            return getattr(super().__getattr__("base_layer"), name)


def layers_with_keys(family: Family, prefix: str = "") -> AttentionLayers:
    """Return the attention layers that have a ``to_k``, and the projections of all layers.

    Args:
        family: The model.
        prefix: Beginning of the names of the layers that read reference tokens.
    """
    projections = family.adapter_targets(family.denoiser_key)
    ends = ".to_k"
    attentions = {
        name.removesuffix(ends): out
        for name, (out, _) in projections.items()
        if name.startswith(prefix) and name.endswith(ends)
    }
    return AttentionLayers(attentions, projections)


@contextmanager
def attach(
    denoiser: Any,
    adapter: ReferenceAdapter,
    scale: Scale,
    insert: Callable[[dict[str, Any], Tensor], dict[str, Any]],
    projection: tuple[str, nn.Module],
    make_processor: Callable[..., nn.Module | None],
) -> Iterator[Attachment]:
    """Attach an adapter to a denoiser for a time; see ``attached`` of the seams.

    Args:
        denoiser: The denoiser; may be compiled.
        adapter: The adapter.
        scale: Scale of the references.
        insert: See :class:`Attachment`.
        projection: Attribute of the denoiser for the projection of image tokens, and its value.
        make_processor: ``make_processor(module, name, adapter, attachment, scale)`` returns the
            processor of an attention layer; None to leave the layer as it is.
    """
    model = uncompiled(denoiser)
    attachment = Attachment(denoiser, insert)
    with ExitStack() as stack:
        stack.enter_context(replace_projections(model, adapter, attachment, scale))
        stack.enter_context(set_attribute(model, *projection))
        for name in adapter.layers.attentions:
            module = model.get_submodule(name)
            processor = make_processor(module, name, adapter, attachment, scale_of(scale, name))
            if processor is not None:
                stack.enter_context(replace_processor(module, processor))
        yield attachment


@contextmanager
def replace_projections(
    denoiser: nn.Module, adapter: ReferenceAdapter, attachment: Attachment, scale: Scale
) -> Iterator[None]:
    """Put the adapter's LoRAs on the projections of a denoiser.

    Args:
        denoiser: The uncompiled denoiser.
        adapter: The adapter.
        attachment: Where the rows' scales are read.
        scale: Scale of the references.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, update in adapter.updates().items():
            layer_scale = scale_of(scale, name)
            if layer_scale == 0.0:
                continue
            path, _, child = name.rpartition(".")
            parent = denoiser.get_submodule(path)
            module = parent.get_submodule(child)
            parent._modules[child] = AdaptedProjection(module, update, attachment, layer_scale)
            replaced.append((parent, child, module))
        yield
    finally:
        for parent, child, module in replaced:
            parent._modules[child] = module


@contextmanager
def replace_processor(attention: Any, processor: nn.Module) -> Iterator[None]:
    """Give an attention module another processor for a time."""
    before = attention.processor
    attention.set_processor(processor)
    try:
        yield
    finally:
        attention.set_processor(before)


@contextmanager
def set_attribute(module: nn.Module, name: str, value: nn.Module) -> Iterator[None]:
    """Set an attribute of a module to another module, and restore it exactly as it was stored."""
    attributes = [mapping for mapping in (vars(module), module._modules) if name in mapping]
    before = [(mapping, mapping[name]) for mapping in attributes]
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        for mapping, old in before:
            mapping[name] = old


def scale_of(scale: Scale, name: str) -> float:
    """Return the scale of the references in the module of this name."""
    return float(scale(name) if callable(scale) else scale)


def per_row(factors: Tensor, output: Tensor) -> Tensor:
    """Return factors (rows,) for an output with one or several entries for each row."""
    return repeat_rows(factors, output).to(output).reshape(-1, *[1] * (output.ndim - 1))


def repeat_rows(values: Tensor, output: Tensor) -> Tensor:
    """Repeat (rows, ...) for an output with one or several entries for each row."""
    repeats = len(output) // len(values)
    return values if repeats == 1 else values.repeat_interleave(repeats, dim=0)
