"""LoRA, LoHa, LoKr and full differences of all shapes, compared with float64."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import customize  # noqa: F401
from customize.concepts.formats.layer_updates import decode_update
from customize.concepts.formats.tensor_group import TensorGroup
from customize.core.lowrank import LowRank, to_dense
from tests.concepts.formats.adapter_files import write_file
from tests.tiny_video import tiny_wan

sides = st.integers(1, 4)
kernels = st.sampled_from([(), (1, 1), (3, 3), (1, 3), (1, 1, 1), (2, 2, 2), (3,)])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
alphas = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 4.0]))
alpha_shapes = st.sampled_from([(), (1,), (1, 1)])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """The same values in another memory layout, as of slices and transposes."""
    turned = tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(turned, tensor)
    return turned


def made(parts: dict[str, Tensor], alpha: float | None, shape: tuple[int, ...] = ()) -> LowRank:
    strided_parts = {name: strided(part) for name, part in parts.items()}
    if alpha is not None:
        strided_parts["alpha"] = torch.full(shape, alpha)
    group = TensorGroup("layer", strided_parts, dict.fromkeys(strided_parts, "layer.key"))
    # A file without alpha and configuration: alpha is the rank.
    return decode_update(group, lambda rank: 1.0, lambda: pytest.fail("no weight is needed"))


def assert_near(actual: LowRank, expected: Tensor) -> None:
    expected_matrix = expected.flatten(1)
    assert actual.shape == expected_matrix.shape
    got = actual.scale * (actual.up.double() @ actual.down.double())
    assert (got - expected_matrix).norm() <= 2e-5 * expected_matrix.norm() + 1e-7
    assert to_dense(actual).isfinite().all()


def scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


@settings(deadline=None)
@given(sides, sides, sides, kernels, dtypes, alphas, alpha_shapes)
def test_lora(out, width, rank, kernel, dtype, alpha, shape) -> None:
    down = random(rank, width, *kernel, dtype=dtype)
    up = random(out, rank, *[1] * len(kernel), seed=1, dtype=dtype)
    expected = scale(alpha, rank) * up.double().flatten(1) @ down.double().flatten(1)
    assert_near(made({"down": down, "up": up}, alpha, shape), expected)


@settings(deadline=None)
@given(sides, sides, sides, kernels.filter(bool), dtypes, alphas)
def test_lora_with_a_core(out, width, rank, kernel, dtype, alpha) -> None:
    ones = [1] * len(kernel)
    parts = {
        "down": random(rank, width, *ones, dtype=dtype),
        "mid": random(rank, rank, *kernel, seed=1, dtype=dtype),
        "up": random(out, rank, *ones, seed=2, dtype=dtype),
    }
    up, mid, down = (parts[key].double() for key in ("up", "mid", "down"))
    expected = torch.einsum("or,rs...,si->oi...", up.flatten(1), mid, down.flatten(1))
    assert_near(made(parts, alpha), scale(alpha, rank) * expected)


@settings(deadline=None)
@given(sides, sides, sides, kernels, st.booleans(), dtypes, alphas)
def test_loha(out, width, rank, kernel, cores, dtype, alpha) -> None:
    parts, factors = {}, []
    for n in (1, 2):
        if cores and kernel:
            core = random(rank, rank, *kernel, seed=n, dtype=dtype)
            a, b = random(rank, out, seed=n, dtype=dtype), random(rank, width, seed=n, dtype=dtype)
            parts[f"hada_t{n}"] = core
            factors.append(torch.einsum("rs...,ro,si->oi...", *(x.double() for x in (core, a, b))))
        else:
            a = random(out, rank, seed=n, dtype=dtype)
            b = random(rank, width * math.prod(kernel), seed=n, dtype=dtype)
            factors.append((a.double() @ b.double()).reshape(out, width, *kernel))
        parts |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
    assert_near(made(parts, alpha), scale(alpha, rank) * factors[0] * factors[1])


@settings(deadline=None, max_examples=200)
@given(
    *(sides, sides, sides, sides, sides, kernels),
    *(st.sampled_from(["whole", "factors"]), st.sampled_from(["whole", "factors", "tucker"])),
    *(dtypes, alphas, alpha_shapes),
)
def test_lokr(a, b, c, d, rank, kernel, first, second, dtype, alpha, shape) -> None:
    parts = {}
    if first == "whole":
        parts["lokr_w1"] = random(a, b, dtype=dtype)
        one = parts["lokr_w1"].double()
    else:
        parts |= {
            "lokr_w1_a": random(a, rank, dtype=dtype),
            "lokr_w1_b": random(rank, b, dtype=dtype),
        }
        one = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    if second == "whole":
        parts["lokr_w2"] = random(c, d, *kernel, seed=1, dtype=dtype)
        two = parts["lokr_w2"].double()
    elif second == "tucker" and kernel:
        parts["lokr_t2"] = random(rank, rank, *kernel, seed=1, dtype=dtype)
        parts |= {
            "lokr_w2_a": random(rank, c, seed=2, dtype=dtype),
            "lokr_w2_b": random(rank, d, seed=3, dtype=dtype),
        }
        values = (parts[f"lokr_{key}"].double() for key in ("t2", "w2_a", "w2_b"))
        two = torch.einsum("rs...,ro,si->oi...", *values)
    else:
        parts["lokr_w2_a"] = random(c, rank, seed=2, dtype=dtype)
        parts["lokr_w2_b"] = random(rank, d * math.prod(kernel), seed=3, dtype=dtype)
        two = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
        two = two.reshape(c, d, *kernel)
    expected = torch.einsum("ab,cd...->acbd...", one, two).reshape(a * c, b * d, *kernel)
    whole = (first, second) == ("whole", "whole")
    factor = 1.0 if whole else scale(alpha, rank)
    assert_near(made(parts, alpha, shape), factor * expected)


@settings(deadline=None)
@given(sides, sides, kernels, dtypes)
def test_full_differences(out, width, kernel, dtype) -> None:
    change = random(out, width, *kernel, dtype=dtype)
    assert_near(made({"diff": change}, None), change.double())


@pytest.mark.parametrize("fuse", [False, True])
def test_a_convolution_over_time(fuse: bool, tmp_path: Path) -> None:
    """Files of other programs also change Wan's patch embedding, a convolution in 3 dimensions."""
    pipe: Any = tiny_wan()
    layer = pipe.transformer.patch_embedding
    before = layer.weight.detach().clone()
    out, channels, *kernel = before.shape
    up, down = random(out, 2, 1, 1, 1), random(2, channels, *kernel)
    name = "diffusion_model.patch_embedding"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    path = write_file(tmp_path / "patches.safetensors", tensors)
    picture = random(1, channels, *(2 * side for side in kernel))
    change = (up.double().flatten(1) @ down.double().flatten(1)).reshape(before.shape)
    expected = torch.nn.functional.conv3d(
        picture.double(), before.double() + change, layer.bias.double(), layer.stride
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.load_custom(path, fuse=fuse)
    actual = pipe.transformer.patch_embedding(picture)
    assert (actual - expected).abs().max() < 1e-4
    pipe.unload_custom()
    assert torch.equal(pipe.transformer.patch_embedding.weight, before)
