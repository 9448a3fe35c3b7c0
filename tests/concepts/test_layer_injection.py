"""Layers that are wrapped one by one equal those of peft's own injection."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from customize.concepts.layer_injection import LayerInjector, _Uninitialized, exact_pattern
from tests.tiny import tiny_sd, tiny_sd3

LAYERS = {
    tiny_sd: ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in", "conv_out"),
    tiny_sd3: ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "proj_out"),
}


def attributes(model: nn.Module):
    """What injection sets, apart from the values of factors."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {
        "modules": [(name, str(module)) for name, module in model.named_modules()],
        "parameters": {name: p.shape for name, p in model.named_parameters()},
        "layers": {
            name: (layer.r, layer.lora_alpha, layer.scaling, layer.active_adapters)
            for name, layer in layers.items()
        },
        "configs": {name: config.to_dict() for name, config in model.peft_config.items()},
    }


@pytest.mark.parametrize("make", LAYERS)
def test_wrapped_layers_equal_those_of_peft(make) -> None:
    def configs():
        first, second, third = LAYERS[make]
        rank = {exact_pattern(second): 3}
        alpha = {exact_pattern(first): 0.5, exact_pattern(third): 7.0}
        for targets in ([first, second, third], [first]):  # the second on a wrapped layer
            yield LoraConfig(
                r=2,
                lora_alpha=2,
                target_modules=targets,
                rank_pattern=rank if second in targets else {},
                alpha_pattern={
                    key: alpha[key] for key in map(exact_pattern, targets) if key in alpha
                },
            )

    ours, peft = (
        make().components["transformer" if make is tiny_sd3 else "unet"] for _ in range(2)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        for name, own, theirs in zip(("a", "b"), configs(), configs(), strict=True):
            LayerInjector(ours, own, name)
            inject_adapter_in_model(theirs, peft, name, low_cpu_mem_usage=True)
    for layer in (module for module in peft.modules() if hasattr(module, "lora_A")):
        layer.set_adapter([name for name in layer.lora_A if name == "a"] or ["b"])
    assert attributes(ours) == attributes(peft)
    assert all(p.is_meta == (".lora_" in name) for name, p in ours.named_parameters())
    # peft freezes the model's own parameters.
    assert all(p.requires_grad for name, p in ours.named_parameters() if ".lora_" not in name)


def test_weights_that_other_threads_make_meanwhile_are_real() -> None:
    with _Uninitialized(), ThreadPoolExecutor(1) as pool:
        assert nn.Linear(2, 2).weight.is_meta
        other = pool.submit(nn.Linear, 2, 2).result()
    assert not other.weight.is_meta and torch.isfinite(other.weight).all()
    assert not nn.Linear(2, 2).weight.is_meta
