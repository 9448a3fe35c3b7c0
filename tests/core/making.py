"""Random updates of one layer, and their dense products."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from customize.core.lowrank import LowRank

SCALES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.5])
WEIGHTS = st.floats(-2, 2)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def updates(draw, count=None, dtype=None):
    """Products of one layer, with any mix of rank, scale and dtype, and their weights."""
    out, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    products = []
    for _ in range(count or draw(st.integers(1, 4))):
        rank, kind = draw(st.integers(1, 6)), dtype or draw(DTYPES)
        up = torch.randn(out, rank, generator=generator).to(kind)
        down = torch.randn(rank, width, generator=generator).to(kind)
        products.append(LowRank(up, down, draw(SCALES)))
    return products, [draw(WEIGHTS) for _ in products]


def dense(p: LowRank) -> torch.Tensor:
    return p.scale * (p.up.double() @ p.down.double())


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual.double() - expected).abs().max() <= tolerance * (1 + expected.abs().max()))
