"""OFT and BOFT files of several programs, compared with their layers or formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BOFTConfig, OFTConfig, get_peft_model
from torch import Tensor

from customize.concepts.formats.open_adaptation import open_adaptation
from customize.errors import ConceptError
from customize.families import family_of
from tests.concepts.formats.adapter_files import Deltas, assert_close, dense_updates, write_file
from tests.tiny import tiny_flux, tiny_sd

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
POINT = "down_blocks.0.attentions.0.proj_in"  # a convolution of one pixel


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def read(source: Path, pipe: Any) -> Deltas:
    def weight(component: str, module: str) -> Tensor:
        return getattr(pipe, component).get_submodule(module).weight

    return dense_updates(open_adaptation(source).to_lora(family_of(pipe.components), weight))  # type: ignore[union-attr]


def of_unet(module: str) -> Tensor:
    return tiny_sd().unet.get_submodule(module).weight.detach().double()


def flat(prefix: str, module: str) -> str:
    return f"{prefix}{module.replace('.', '_')}"


def bounded(blocks: Tensor, most: float) -> Tensor:
    """The rotations of sd-scripts' networks/oft.py, float64."""
    skew = (blocks - blocks.mT).double()
    skew = skew * (min(float(skew.norm()), most) + 1e-8) / (float(skew.norm()) + 1e-8)
    eye = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (eye + skew) @ torch.linalg.inv(eye - skew)


def by_rows(weight: Tensor, turns: Tensor) -> Tensor:
    parts = weight.reshape(turns.shape[0], turns.shape[1], -1)
    return torch.einsum("knm,kni->kmi", turns, parts).reshape(weight.shape) - weight


@pytest.mark.parametrize("module", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0])
def test_oft_of_sd_scripts(module: str, alpha: float, tmp_path: Path) -> None:
    weight = of_unet(module)
    out = len(weight)
    blocks = random(4, out // 4, out // 4)
    name = flat("oft_unet_", module)
    tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(alpha)}
    actual = read(write_file(tmp_path / "a.safetensors", tensors), tiny_sd())
    if alpha == 0.0:  # its bound, and so no rotation
        assert float(actual["unet", module].abs().max()) < 1e-6
        return
    expected = by_rows(weight, bounded(blocks, alpha * out))
    assert_close(actual, {("unet", module): expected}, 1e-4)


def test_alpha_of_zero_is_no_bound_in_lycoris(tmp_path: Path) -> None:
    weight = of_unet(LINEAR)
    blocks = random(4, len(weight) // 4, len(weight) // 4)
    name = flat("lycoris_", LINEAR)
    tensors = {f"{name}.oft_blocks": blocks, f"{name}.alpha": torch.tensor(0.0)}
    expected = by_rows(weight, bounded(blocks, 1e9))
    actual = read(write_file(tmp_path / "a.safetensors", tensors), tiny_sd())
    assert_close(actual, {("unet", LINEAR): expected}, 1e-5)


def test_oft_of_sd_scripts_without_alpha_is_refused(tmp_path: Path) -> None:
    blocks = {f"{flat('oft_unet_', LINEAR)}.oft_blocks": torch.zeros(4, 4, 4)}
    with pytest.raises(ConceptError, match="no alpha, which bounds them"):
        read(write_file(tmp_path / "a.safetensors", blocks), tiny_sd())


@pytest.mark.parametrize("alpha", [1e-3, 10.0])
def test_oft_of_sd_scripts_for_flux(alpha: float, tmp_path: Path) -> None:
    """Separate blocks and bounds for q, k and v, and one set for layers that are not split."""
    pipe = tiny_flux()
    block = "transformer_blocks.0.attn"
    modules = [f"{block}.to_{x}" for x in "qkv"]
    weights = {
        m: pipe.transformer.get_submodule(m).weight.detach().double()
        for m in (*modules, f"{block}.to_out.0")
    }
    name, other = "oft_unet_double_blocks_0_img_attn_qkv", "oft_unet_double_blocks_0_img_attn_proj"
    tensors, expected = {}, {}
    for number, module in enumerate(modules):
        weight = weights[module]
        blocks = (1 + number) * random(4, len(weight) // 4, len(weight) // 4, seed=number)
        tensors[f"{name}.oft_blocks.{number}"] = blocks
        turns = bounded(blocks, alpha * len(weight))
        expected["transformer", module] = by_rows(weight, turns)
    weight = weights[f"{block}.to_out.0"]
    tensors[f"{other}.oft_blocks.0"] = random(2, len(weight) // 2, len(weight) // 2)
    turns = bounded(tensors[f"{other}.oft_blocks.0"], alpha * len(weight))
    expected["transformer", f"{block}.to_out.0"] = by_rows(weight, turns)
    tensors |= {f"{layer_name}.alpha": torch.tensor(alpha) for layer_name in (name, other)}
    actual = read(write_file(tmp_path / "a.safetensors", tensors), pipe)
    assert_close(actual, expected, 1e-4)


def test_missing_split_blocks_are_refused(tmp_path: Path) -> None:
    name = "oft_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.oft_blocks.{n}": torch.zeros(4, 8, 8) for n in (0, 2)}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    with pytest.raises(ConceptError, match=r"oft_blocks_0 and oft_blocks_2 and no oft_blocks_1"):
        read(write_file(tmp_path / "a.safetensors", tensors), tiny_flux())
    tensors = {f"{name}.oft_blocks.{n}": torch.zeros(4, 8, 8) for n in (0, 1)}
    tensors[f"{name}.alpha"] = torch.tensor(1.0)
    with pytest.raises(ConceptError, match=r"blocks of \[32, 32\] rows do not rotate 96 rows"):
        read(write_file(tmp_path / "a.safetensors", tensors), tiny_flux())


def test_stored_rotations_of_older_lycoris(tmp_path: Path) -> None:
    weight = of_unet(LINEAR)
    turns = bounded(random(4, len(weight) // 4, len(weight) // 4), 1e9)
    name = flat("lora_unet_", LINEAR)
    tensors = {f"{name}.oft_diag": turns.float(), f"{name}.alpha": torch.tensor(4.0)}
    actual = read(write_file(tmp_path / "a.safetensors", tensors), tiny_sd())
    assert_close(actual, {("unet", LINEAR): by_rows(weight, turns)}, 1e-5)
    tensors[f"{name}.oft_diag"] = torch.zeros(4, 4, 4)
    with pytest.raises(ConceptError, match="are not rotations"):
        read(write_file(tmp_path / "b.safetensors", tensors), tiny_sd())


OFTS: dict[str, dict[str, Any]] = {
    "series": {"oft_block_size": 4, "r": 0},
    "series of 3": {"oft_block_size": 4, "r": 0, "num_cayley_neumann_terms": 3},
    "series of 8": {"oft_block_size": 8, "r": 0, "num_cayley_neumann_terms": 8},
    "exact": {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False},
    "by number": {"r": 4, "oft_block_size": 0},
    "shared": {"oft_block_size": 4, "r": 0, "block_share": True},
    "bounded": {"oft_block_size": 4, "r": 0, "coft": True, "eps": 0.1},
    "bounded, shared": {
        "r": 4,
        "oft_block_size": 0,
        "coft": True,
        "eps": 0.05,
        "block_share": True,
    },
}


def trained(config: Any, kind: str) -> Any:
    model: Any = get_peft_model(tiny_sd().unet, config).eval()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if kind in name:
            parameter.data = 0.3 * random(*parameter.shape, seed=number)
        if "boft_s" in name:
            parameter.data += 1.0
    return model


def answers(model: Any) -> Deltas:
    """The change of every layer with an adapter, measured from its outputs."""
    actual = {}
    base = tiny_sd().unet
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        plain = base.get_submodule(name)
        wide = isinstance(plain, torch.nn.Conv2d)
        eye = torch.eye(plain.weight.shape[1])
        inputs = eye[:, :, None, None] if wide else eye
        with torch.no_grad():
            delta = (module(inputs) - plain(inputs)).double()
        actual["unet", name] = (delta[:, :, 0, 0] if wide else delta).T
    return actual


@pytest.mark.parametrize("kind", OFTS)
def test_peft_oft(kind: str, tmp_path: Path) -> None:
    model = trained(OFTConfig(target_modules=["to_q", "to_k", "proj_in"], **OFTS[kind]), "oft_")
    model.save_pretrained(tmp_path)
    expected = answers(model)
    assert len(expected) > 10
    assert_close(read(tmp_path, tiny_sd()), expected, 2e-4)


def test_peft_oft_of_a_wide_convolution_is_refused(tmp_path: Path) -> None:
    model = trained(OFTConfig(target_modules=["conv1"], oft_block_size=4, r=0), "oft_")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConceptError, match="rotates the patches"):
        read(tmp_path, tiny_sd())


def test_peft_oft_without_a_configuration_is_refused(tmp_path: Path) -> None:
    trained(OFTConfig(target_modules=["to_q"], oft_block_size=4, r=0), "oft_").save_pretrained(
        tmp_path
    )
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConceptError, match=r"configuration that is missing.*adapter_config\.json"):
        read(tmp_path, tiny_sd())


def test_peft_boft(tmp_path: Path) -> None:
    model = trained(
        BOFTConfig(target_modules=["to_q", "to_k", "proj_in"], boft_block_size=4), "boft_"
    )
    model.save_pretrained(tmp_path)
    assert_close(read(tmp_path, tiny_sd()), answers(model), 2e-4)


@pytest.mark.parametrize("stages", [2, 3])
def test_peft_boft_of_several_stages(stages: int, tmp_path: Path) -> None:
    """Computed by peft's permutations and transform, because these adapters train only on a GPU."""
    config = BOFTConfig(target_modules=[LINEAR], boft_block_size=4)
    layer = trained(config, "boft_").base_model.model.get_submodule(LINEAR)
    weight = of_unet(LINEAR)
    out, width = weight.shape
    blocks = random(stages, width // 4, 4, 4)
    scales = 1.0 + random(out, 1)
    whole = torch.eye(width, dtype=torch.float64)
    for stage in range(stages):
        turns = layer.cayley_batch(blocks[stage].double())
        order = layer.block_butterfly_perm(width, width // 4 // 2**stage, 2, stages - 1)
        permuted = layer.perm2mat(order).double()
        whole = permuted @ torch.block_diag(*turns) @ permuted.T @ whole
    expected = scales.double() * (whole @ weight.T).T - weight
    name = flat("lora_unet_", LINEAR)  # as newer sd-scripts writes it
    tensors = {f"{name}.boft_R": blocks, f"{name}.boft_s": scales}
    actual = read(write_file(tmp_path / "a.safetensors", tensors), tiny_sd())
    assert_close(actual, {("unet", LINEAR): expected}, 1e-5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("module", [LINEAR, POINT, CONV])
def test_oft_of_onetrainer(module: str, scaled: bool, tmp_path: Path) -> None:
    """Different keys and no configuration; convolutions are multiplied from the other side."""
    weight = of_unet(module)
    width = weight[0].numel()
    entries = 0.3 * random(width // 4, 6)
    name = flat("lora_unet_", module)
    tensors = {f"{name}.oft_R.weight": entries}
    if scaled:
        tensors[f"{name}.oft_R.scaled_oft"] = torch.tensor(1)
    values = (entries / 6**0.5 if scaled else entries).double()
    upper = torch.zeros(width // 4, 4, 4, dtype=torch.float64)
    upper[:, *torch.triu_indices(4, 4, 1)] = values
    q = upper - upper.mT
    turns = torch.eye(4, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    turn = torch.block_diag(*turns)
    rows = weight.flatten(1)
    expected = rows @ (turn.T if module == LINEAR else turn) - rows
    actual = read(write_file(tmp_path / "a.safetensors", tensors), tiny_sd())
    assert_close(actual, {("unet", module): expected}, 1e-5)
