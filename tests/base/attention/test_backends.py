"""Error, requirements and speed of attention backends."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from customize.base.attention.backends import (
    ERROR_BOUNDS,
    SPEED_MARGIN,
    HeadShape,
    find_unmet_requirement,
    measure_error,
    reference_attention,
    relative_error,
    run_attention,
    select_fastest,
    time_attention,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: Heads of SD 1.5, SDXL, SD 3.5, FLUX and Qwen-Image, and of AutoencoderKL.
HEAD_SHAPES = [
    HeadShape(8, 40),
    HeadShape(8, 80),
    HeadShape(8, 160),
    HeadShape(10, 64),
    HeadShape(38, 64),
    HeadShape(24, 128),
]
HEAD_SHAPES += [HeadShape(1, 512)]


def test_the_reference_equals_the_formula():
    query, key, value = (torch.randn(1, tokens, 2, 3) for tokens in (4, 5, 5))
    mask = torch.tensor([True, True, False, True, False])[None, None, None]
    actual = reference_attention(query, key, value, mask)
    for head in range(2):
        for row in range(4):
            parts = [
                math.exp(float(query[0, row, head] @ key[0, k, head]) / math.sqrt(3))
                for k in (0, 1, 3)
            ]
            expected = sum(
                part / sum(parts) * value[0, k, head].double()
                for part, k in zip(parts, (0, 1, 3), strict=True)
            )
            torch.testing.assert_close(actual[0, row, head], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_native_kernels_are_accurate_at_real_head_shapes(backend, dtype, heads):
    for mask in (None, "boolean", "added"):
        error = measure_error(backend, heads, CPU, dtype, mask)
        # Not zero, because the reference is in float64; and well below the bound.
        assert 0 < error < ERROR_BOUNDS[dtype] / 2


WRONG_ATTENTIONS = {
    "another scale": lambda q, k, v, mask: scaled_dot_product_attention(
        q, k, v, mask, scale=1 / q.shape[-1]
    ),
    "no mask": lambda q, k, v, mask: scaled_dot_product_attention(q, k, v),
    "a causal mask": lambda q, k, v, mask: scaled_dot_product_attention(q, k, v, is_causal=True),
    "the last key left out": lambda q, k, v, mask: scaled_dot_product_attention(
        q, k[:, :, :-1], v[:, :, :-1], mask[..., :-1]
    ),
    # type_as turns a boolean mask into 1 and 0, which are added to the scores.
    "a mask that is added": lambda q, k, v, mask: scaled_dot_product_attention(
        q, k, v, mask.type_as(q)
    ),
    "not a number": lambda q, k, v, mask: torch.full_like(q, math.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", WRONG_ATTENTIONS)
def test_wrong_kernels_exceed_the_error_bound(monkeypatch, kind, dtype):
    def wrong(query, key, value, attn_mask=None):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return WRONG_ATTENTIONS[kind](query, key, value, attn_mask).transpose(1, 2)

    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, wrong)
    arguments = {"query", "key", "value", "attn_mask"}
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, arguments)
    assert measure_error(name.value, HeadShape(8, 40), CPU, dtype, "boolean") > ERROR_BOUNDS[dtype]


@given(st.floats(1e-3, 1e3), st.integers(0, 3), st.integers(0, 4))
def test_the_error_is_the_largest_of_a_row_and_relative(scale, head, row):
    expected = torch.randn(1, 5, 4, 8, generator=torch.Generator().manual_seed(0)).double() * scale
    actual = expected.clone()
    assert relative_error(actual, expected) == 0
    rms = float(expected.square().mean().sqrt())
    actual[0, row, head] += 0.25 * rms
    assert relative_error(actual, expected) == pytest.approx(0.25, rel=1e-6)


def test_unmet_requirements_are_known_without_a_call():
    half, heads = torch.bfloat16, HeadShape(24, 128)
    assert find_unmet_requirement("native", heads, CPU, torch.float32) is None
    assert find_unmet_requirement("flash", heads, CUDA, half) is None
    assert "needs a CUDA device, and the model is on cpu" in find_unmet_requirement(
        "flash", heads, CPU, half
    )
    assert "needs a CUDA device" in find_unmet_requirement("xformers", heads, CPU, torch.float32)
    assert "needs float16 or bfloat16" in find_unmet_requirement(
        "flash", heads, CUDA, torch.float32
    )
    assert find_unmet_requirement("xformers", HeadShape(1, 512), CUDA, torch.float32) is None
    assert "at most width 256, and the model has width 512" in find_unmet_requirement(
        "flash", HeadShape(1, 512), CUDA, half
    )
    assert "at most width 128" in find_unmet_requirement("sage", HeadShape(8, 160), CUDA, half)


def test_a_call_does_not_change_the_active_backend():
    before = _AttentionBackendRegistry.get_active_backend()[0]
    query = torch.randn(1, 4, 2, 8)
    run_attention("_native_math", query, query, query)
    assert _AttentionBackendRegistry.get_active_backend()[0] is before


def test_as_many_times_as_repeats_are_returned():
    times = time_attention("native", HeadShape(2, 8), CPU, torch.float32, 32, 3)
    assert len(times) == 3 and all(seconds > 0 for seconds in times)


@given(
    st.dictionaries(st.sampled_from(["flash", "xformers", "_native_cudnn"]), st.floats(1e-6, 1)),
    st.floats(1e-6, 1),
)
def test_another_backend_is_chosen_above_the_speed_margin_only(others, native):
    fastest = select_fastest({"native": native, **others})
    if fastest == "native":
        assert all(time >= SPEED_MARGIN * native for time in others.values())
    else:
        assert others[fastest] == min(others.values()) and others[fastest] < SPEED_MARGIN * native
