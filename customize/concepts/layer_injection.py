"""peft's LoRA layers around given layers of a model, at the cost of making these layers.

``peft.inject_adapter_in_model`` compares every module of the model with its configuration, passes
over all modules and parameters several times to set flags, and initializes the factors.
:mod:`.peft_adapter` names the layers and sets the flags and factors itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from torch.overrides import TorchFunctionMode


def exact_pattern(module: str) -> str:
    """The key of a module in peft's rank and alpha patterns, which are regular expressions."""
    return f"^{re.escape(module)}"


class LayerInjector(LoraModel):
    """peft's LoRA model that wraps ``config.target_modules``, which are exact module names.

    Keys of the configuration's rank and alpha patterns are those of :func:`exact_pattern`.
    The factors are on the meta device. Other layers, the ``requires_grad`` flags of the model's own
    parameters and the active adapters of wrapped layers stay as they are.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> None:
        """Wrap the layers, or add the adapter to layers that are wrapped.

        Args:
            model: The denoiser or text encoder.
            adapter_name: Adapter name in peft, new to the model.
            *_: Further arguments of peft, which have no effect.
            **__: The same.
        """
        config: LoraConfig = self.peft_config[adapter_name]
        layer_config = copy(config)
        layer_config.rank_pattern, layer_config.alpha_pattern = {}, {}
        with _Uninitialized():
            for name in sorted(config.target_modules):
                key = exact_pattern(name)
                layer_config.r = config.rank_pattern.get(key, config.r)
                layer_config.lora_alpha = config.alpha_pattern.get(key, config.lora_alpha)
                parent, _, leaf = name.rpartition(".")
                self._create_and_replace(
                    layer_config,
                    adapter_name,
                    model.get_submodule(name),
                    leaf,
                    model.get_submodule(parent),
                    current_key=name,
                )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # peft moves factors here that are not on the meta device.
        setattr(parent, child_name, new_module)


class _Uninitialized(TorchFunctionMode):
    """New weights are on the meta device and stay uninitialized, in this thread alone.

    peft's own ``init_empty_weights`` replaces a method of ``nn.Module``, for all threads.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            return func(*args, **kwargs | {"device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
