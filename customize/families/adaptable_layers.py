"""The layers of a model that take adapters, their names in files, and the model's fingerprint."""

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

# Newer versions of transformers have no `text_model` level in CLIPTextModel.
_CLIP_PROJECTIONS = re.compile(
    r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
)

#: The convolutions that take an adapter if they have one group.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *CONVOLUTIONS)

_INSIDE_ADAPTER = re.compile(r"(^|\.)(base_layer|lora_[A-Za-z_]+)(\.|$)")


class AdaptableLayers(Components, ABC):
    """The layers of a model's denoisers and CLIP text encoders."""

    #: The full names of the denoiser's attention projections.
    attention_projections: ClassVar[re.Pattern[str]]
    #: Whether kohya's files use the original layer names of the denoiser, not those of diffusers.
    kohya_uses_original_names: ClassVar[bool] = True

    def adapter_targets(self, component: str) -> dict[str, tuple[int, int]]:
        """Return the attention projections of one component.

        Args:
            component: A key of :attr:`denoisers` or :attr:`text_encoders`.

        Returns:
            Module name within the component -> (out, in), in the module tree's order, with or
            without attached adapters.

        Raises:
            ConfigError: The component takes no adapter.
            PipelineError: The component has been freed.
        """
        of_denoiser = component in (self.denoiser_key, *self.other_denoisers)
        pattern = self.attention_projections if of_denoiser else _CLIP_PROJECTIONS
        return {
            name: shape for name, shape in self.layers(component).items() if pattern.fullmatch(name)
        }

    def layers(self, component: str) -> dict[str, tuple[int, int]]:
        """Return all linear layers and convolutions of one component that can take an adapter.

        Order and errors are those of :meth:`adapter_targets`.

        Args:
            component: A key of :attr:`denoisers` or :attr:`text_encoders`.

        Returns:
            Module name within the component -> (out, in); ``in`` of a convolution is the product
            of its input channels and its kernel's sides.
        """
        shapes = self.weight_shapes(component)
        return {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()}

    def weight_shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Return :meth:`layers` with their weights' shapes: (out, in), or (out, in, *kernel)."""
        denoisers = (self.denoiser_key, *self.other_denoisers)
        if component not in (*denoisers, *self.clip_encoders):
            raise ConfigError(
                f"the component {component!r} of family {self.name} takes no adapter",
                fix=suggest_names(component, (*denoisers, *self.clip_encoders)),
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in uncompiled(self._component(component)).named_modules():
            layer = module._modules.get("base_layer", module)
            if not isinstance(layer, _LAYERS) or _INSIDE_ADAPTER.search(name):
                continue
            # Not the weight's shape, because quantization changes it.
            if isinstance(layer, nn.Linear):
                shapes[name] = (layer.out_features, layer.in_features)
            elif layer.groups == 1:
                shapes[name] = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        return shapes

    @classmethod
    @abstractmethod
    def published_models(cls) -> list[dict[str, nn.Module]]:
        """Return new denoisers and CLIP text encoders of each published size.

        They serve for the names and shapes of their layers; within
        :func:`~customize.families.meta_models.on_meta_device` they have no weights.
        """

    def kohya_metadata(self) -> dict[str, str]:
        """Return the entries on the base in the headers of kohya's files, for user interfaces.

        Empty if kohya's format does not support the family.
        """
        return {}

    def original_names(self) -> dict[str, tuple[RowRange, ...]]:
        """Return the original names of the denoiser's layers, as in its authors' checkpoints.

        Returns:
            Original layer name -> row ranges of diffusers' layers, in the order of the original's
            rows: several where the original fuses layers that diffusers separates. Empty if the
            names are the same.
        """
        return {}

    def fingerprint(self) -> dict[str, Any]:
        """Return what a concept's base must equal: the same for all models of one architecture.

        Compute it before text encoders are freed, because it contains their widths.

        Returns:
            JSON values. "family": the name; "denoiser": SHA-256 over the denoiser's architecture
            and the names and shapes of the adapter targets of all denoisers; "widths": component
            -> the distinct input widths of its targets, ascending.
        """
        targets = {key: self.adapter_targets(key) for key in self.adaptable}
        lines = [self._architecture]
        for key in self.denoisers:
            prefix = "" if key == self.denoiser_key else f"{key}."
            shapes = targets[key].items()
            lines += sorted(f"{prefix}{name} {out}x{width}" for name, (out, width) in shapes)
        widths = {key: sorted({width for _, width in targets[key].values()}) for key in targets}
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        return {"family": self.name, "denoiser": digest, "widths": widths}

    @property
    def _architecture(self) -> str:
        """A name shared by denoisers with interchangeable concepts: usually their class."""
        return class_name(self.denoiser)
