"""Which layers of a model an adapter can change, what files call them, and how they tell models
apart."""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from customize.errors import ConfigError
from customize.families.original_layer_names import RowRange
from customize.families.pipeline_components import Components, class_name, uncompiled
from customize.near_names import suggest_names

# transformers has the CLIP layers below `text_model` or, in newer versions of CLIPTextModel, not.
_CLIP_PROJECTIONS = re.compile(
    r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
)

#: The convolutions that take an adapter where they have one group.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_INSIDE_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+)(\.|$)")


class AdaptableLayers(Components, ABC):
    """The layers of a model's denoisers and CLIP text encoders."""

    #: The full names of the denoiser's attention projections.
    attention_projections: ClassVar[re.Pattern[str]]
    #: Whether kohya's files call the denoiser's layers as those do who made the model.
    kohya_uses_original_names: ClassVar[bool] = True

    def adapter_targets(self, component: str) -> dict[str, tuple[int, int]]:
        """The attention projections of one component.

        Args:
            component: a key of :attr:`denoisers` or :attr:`text_encoders`.

        Returns:
            module name within the component -> (out, in), in the module tree's order. The same
            whether or not adapters are attached.

        Raises:
            ConfigError: the component takes no adapter.
            PipelineError: it has been freed.
        """
        of_denoiser = component in (self.denoiser_key, *self.other_denoisers)
        pattern = self.attention_projections if of_denoiser else _CLIP_PROJECTIONS
        return {
            name: shape for name, shape in self.layers(component).items() if pattern.fullmatch(name)
        }

    def layers(self, component: str) -> dict[str, tuple[int, int]]:
        """All linear layers and convolutions of one component: what an adapter can change.

        Args, order and errors as :meth:`adapter_targets`.

        Returns:
            module name within the component -> (out, in); of a convolution, ``in`` counts its
            kernel: input channels * its sides.
        """
        shapes = self.weight_shapes(component)
        return {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}

    def weight_shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """The same layers with the shapes of their weights: (out, in), or (out, in, *kernel)."""
        denoisers = (self.denoiser_key, *self.other_denoisers)
        if component not in (*denoisers, *self.clip_encoders):
            raise ConfigError(
                f"the component {component!r} of family {self.name} takes no adapter",
                fix=suggest_names(component, (*denoisers, *self.clip_encoders)),
            )
        found: dict[str, tuple[int, ...]] = {}
        for name, module in uncompiled(self._component(component)).named_modules():
            if _INSIDE_ADAPTER.search(name):
                continue
            layer = getattr(module, "base_layer", module)
            # By the layer's own numbers: a quantized weight has another shape.
            if isinstance(layer, nn.Linear):
                found[name] = (layer.out_features, layer.in_features)
            elif isinstance(layer, CONVOLUTIONS) and layer.groups == 1:
                found[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return found

    @classmethod
    @abstractmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        """The denoiser and CLIP text encoders of each size that was published.

        Made anew, without weights when called within ``torch.device("meta")``; for their layers'
        names and shapes.
        """

    def kohya_metadata(self) -> dict[str, str]:
        """What kohya's trainers note on the base in a file's header, as user interfaces show it.

        Empty where no file is written by kohya's keys.
        """
        return {}

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        """What the denoiser's layers are called in the files of those who made the model.

        Returns:
            The original's name of a layer -> the rows of ours that lie below one another in it:
            several, where the original computes in one layer what diffusers has in more. Empty
            where the names are the same.
        """
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """What a concept must agree with: the same for all models of one architecture.

        Take it before text encoders are freed: their widths are part of it.

        Returns:
            JSON values. "family": the name; "denoiser": sha256 over the denoiser's kind and the
            names and shapes of the adapter targets of all denoisers; "widths": component -> its
            targets' distinct input widths, ascending.
        """
        lines = [self._architecture]
        for key in self.denoisers:
            prefix = "" if key == self.denoiser_key else f"{key}."
            targets = self.adapter_targets(key).items()
            lines += sorted(f"{prefix}{name} {out}x{width}" for name, (out, width) in targets)
        widths = {
            key: sorted({width for _, width in self.adapter_targets(key).values()})
            for key in self.adaptable
        }
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return {"family": self.name, "denoiser": digest, "widths": widths}

    @property
    def _architecture(self) -> str:
        """The same name for denoisers that can take one another's concepts: mostly their class."""
        return class_name(self.denoiser)
