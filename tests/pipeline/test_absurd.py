"""Absurd numbers, masks and amounts: refused in one bounded message, with nothing changed."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from customize import Decor
from customize.base.memory_plan import parse_memory_size
from customize.concepts.merge.write_merged_lora import write_merged
from customize.errors import ConfigError, CustomizeError
from customize.stages.avoid import MAX_PHRASES
from customize.stages.regions import MAX_REGIONS
from customize.training.config import TrainConfig
from tests.pipeline.making import attached, concept
from tests.tiny import drawn, tiny_sd

PROMPT = "a photo of <rex> on a beach"
ABSURD = [
    *(math.nan, math.inf, 10**400, -(10**400), 10**5000, Fraction(10**400), True, None),
    *("1", "x" * 10**6, "\x1b[31m", 1j, Decimal("sNaN"), [], {"a": []}, object(), b"x"),
    *(np.float64("nan"), np.array([0.5, 1.0]), torch.tensor([0.5, 0.5])),
]
HALF = np.concatenate([np.ones((4, 8)), np.zeros((4, 8))])


@pytest.fixture(scope="module")
def pipe():
    return attached()


def draw(pipe, **call):
    noise = torch.Generator().manual_seed(1)
    call |= {"num_inference_steps": 1, "output_type": "latent", "generator": noise}
    return drawn(pipe, PROMPT, **call)


def refused(call) -> None:
    with pytest.raises(CustomizeError) as raised:
        call()
    text = str(raised.value)
    assert len(text) < 6000 and text.isprintable()


def named(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize("value", ABSURD, ids=named)
def test_absurd_numbers_are_refused(value, pipe, tmp_path):
    rex, tom = concept(tiny_sd(), "max", index=3), concept(tiny_sd(), "tom", index=4)

    def merge(weight=1.0, **how):
        write_merged([rex, tom], [weight, 1.0], tmp_path / "a", **how)

    for box in ((0, 0, value, 1), (value, 0, 1, 1), value):
        refused(lambda box=box: draw(pipe, regions={"<rex>": box}))
    refused(lambda: pipe.load_custom(rex, weights=[value]))
    refused(lambda: merge(value))
    refused(lambda: merge(method="dare", settings={"density": value}))
    refused(lambda: merge(method="dare", settings={"seed": value}))
    refused(lambda: parse_memory_size(value, where="memory"))
    for settings in ({"keys": value}, {"negative": value}):
        refused(lambda settings=settings: Decor(**settings))
    if value is not None:  # which stands for the default there
        refused(lambda: merge(rank=value))
        refused(lambda: merge(method=value))
        refused(lambda: draw(pipe, regions=value))
        refused(lambda: Decor(strength=value))
        refused(lambda: Decor(target=value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["rank", "alpha", "steps", "seed", "avoid", "validation_prompts"])
def test_absurd_settings_are_refused(field):
    facts = {"base": "b", "images": "i", "output": "o", "name": "rex", "class_word": "dog"}
    for value in (10**5000, [10**5000], {"a": 10**5000}, {"x" * 10**6: 1}):
        refused(lambda value=value: TrainConfig(**{**facts, field: value}))


@pytest.mark.parametrize("dtype", ["?", "i1", "u2", "i8", "u8", "f2", "f8", ">f4", ">i4", "g"])
def test_masks_of_any_real_dtype_are_equal(pipe, dtype):
    expected = draw(pipe, regions={"<rex>": torch.from_numpy(HALF)})
    assert torch.equal(draw(pipe, regions={"<rex>": HALF.astype(dtype)}), expected)


def masks():
    whole = torch.from_numpy(HALF).float()
    yield from (HALF.astype(t) for t in ("c8", "O", "U1", "M8[s]", "m8[s]", "V4", [("a", "f4")]))
    yield from (whole.to_sparse(), whole.to_sparse_csr(), whole.to("meta"), whole + 0j)
    yield torch.quantize_per_tensor(whole, 0.1, 0, torch.quint8)
    yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    yield np.broadcast_to(np.ones((1, 1)), (10**6, 10**6))
    yield torch.ones(1, 1).expand(10**6, 10**6)
    yield from (np.full((8, 8), bad) for bad in (np.nan, np.inf, 1e300, -1.0, 0.0))
    yield from (np.ones(shape) for shape in ((), (8,), (8, 8, 3), (0, 8)))
    closed = Image.new("L", (8, 8), 255)
    closed.close()
    yield from (closed, Image.new("L", (0, 0)), Image.new("LAB", (8, 8)))


@pytest.mark.parametrize("mask", list(masks()), ids=named)
def test_invalid_masks_are_refused(pipe, mask):
    refused(lambda: draw(pipe, regions={"<rex>": mask}))


def test_too_many_regions_and_avoided_words_are_refused_with_their_limit(pipe):
    regions = {f"word{number}": (0, 0, 1, 1) for number in range(10_000)}
    with pytest.raises(ConfigError, match=f"10,000 regions .* limit of {MAX_REGIONS}"):
        draw(pipe, regions=regions)
    words = [f"word{number}" for number in range(5_000)]
    for call in (lambda: draw(pipe, avoid=words), lambda: Decor(avoid=", ".join(words))):
        with pytest.raises(ConfigError, match=f"5,000 phrases .* limit of {MAX_PHRASES}"):
            call()


def test_too_large_memory_budgets_are_refused():
    refused(lambda: parse_memory_size("9" * 5000 + "GB", where="memory"))
