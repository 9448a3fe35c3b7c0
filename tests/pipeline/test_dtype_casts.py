"""Which casts a layer went through, told by a buffer that went through them too."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from customize.errors import PipelineError
from customize.pipeline import dtype_casts

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]


def same_bits(a, b):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


@settings(max_examples=60, deadline=None)
@given(
    start=st.sampled_from(DTYPES),
    path=st.lists(st.sampled_from([*DTYPES, *NARROW]), max_size=4),
    seed=st.integers(0, 99),
)
def test_recorded_casts_reproduce_those_of_the_layer(start, path, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(64, 64).requires_grad_(False)
    spread = 2.0 ** torch.randint(-24, 8, (64, 64))
    layer.weight.copy_(layer.weight * spread)
    layer.to(start)
    original = layer.weight.detach().clone()
    dtype_casts.start_recording(layer, start)
    for dtype in path:
        layer.to(dtype)
    casts = dtype_casts.get_casts(layer, start, "layer")
    assert same_bits(dtype_casts.apply_casts(original, casts), layer.weight)
    assert len(casts) <= 4 and (path or not casts)


def test_recording_restores_the_layer_and_never_changes_state_dicts():
    layer = nn.Linear(4, 4)
    before = {k: copy.copy(v) for k, v in vars(layer).items()}
    keys = layer.state_dict().keys()
    dtype_casts.start_recording(layer, torch.float32)
    assert layer.state_dict().keys() == keys
    torch.save(layer, io.BytesIO())
    copied = copy.deepcopy(layer).half()
    assert dtype_casts.get_casts(copied, torch.float32, "") == (torch.float16,)
    dtype_casts.stop_recording(layer)
    assert vars(layer) == before


def test_replaced_layers_are_refused():
    with pytest.raises(PipelineError, match=r"replaced or converted by someone else.*\(a\.b\)"):
        dtype_casts.get_casts(nn.Linear(4, 4), torch.float32, "a.b")
    layer = nn.Linear(4, 4)
    dtype_casts.start_recording(layer, torch.float32)
    layer._buffers[dtype_casts._BUFFER + "weight"] *= 2
    with pytest.raises(PipelineError, match="replaced or converted"):
        dtype_casts.get_casts(layer, torch.float32, "a.b")
