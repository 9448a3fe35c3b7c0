"""Inputs of the denoiser's attention, and an independent implementation of DECOR's formulas."""

from __future__ import annotations

import torch
from torch.linalg import svd

import customize
from customize.families import family_of
from customize.stages.decor.kv_updates import COLOURS
from tests.tiny import drawn

PROMPT = "a photo of <rex> and a car on the beach"
AVOID = "red hat, striped cup"
PHRASES = ("red hat", "striped cup")
CLEAN = customize.Decor(target="prompt", strength=1.0)
# Values alone are cleaned, and negative prompts are unchanged.
VALUES_ONLY = {"negative": "keep", "keys": 0.0}


def draw(pipe, prompt=PROMPT, seeds=(1,), **call):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    return drawn(pipe, prompt, generator=noise, **size | call)


def read(pipe, prompt=PROMPT, **call):
    """Return the text input and output of one value projection at the first step, and the layer."""
    family = family_of(pipe.components)
    (name, *_) = family.cross_attention_layers()
    layer = pipe.unet.get_submodule(f"{name}.to_v")
    calls = []
    handle = layer.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    draw(pipe, prompt, num_inference_steps=1, **call)
    handle.remove()
    return (*calls[0], layer)


def words_of(pipe, text):
    """Return the embeddings of a text's words: (words, width)."""
    with torch.no_grad():
        embeddings = family_of(pipe.components).encode_prompts([text])["prompt_embeds"][0]
    return embeddings[1 : 1 + len(pipe.tokenizer(text, add_special_tokens=False).input_ids)]


def values_of(pipe, base, phrases=PHRASES):
    """Return a base layer's values of phrases, averaged over the phrase alone and after a class."""
    start = "a photo of a dog "
    skipped = len(words_of(pipe, start))
    rows = [(words_of(pipe, o) + words_of(pipe, start + o)[skipped:]) / 2 for o in phrases]
    with torch.no_grad():
        return base(torch.cat(rows))


def without(rows, unwanted, strength=1.0):
    """Apply DECOR's formula."""
    right = svd(unwanted, full_matrices=False)[2]
    return rows - strength * rows @ right.T @ right


def colour_directions(pipe, base, heads=2):
    """Return the directions in which values of colours differ, for each head: (5, width)."""
    rows = torch.stack([words_of(pipe, colour).mean(0) for colour in COLOURS])
    with torch.no_grad():
        values = base(rows)
    # The last direction is common to all colours.
    return [svd(v - v.mean(0))[2][: len(COLOURS) - 1] for v in values.chunk(heads, -1)]


def cleaned_update(pipe, base, update, phrases=PHRASES, strength=1.0, by_confidence=True):
    """Project unwanted phrases out of a layer's update (words, width)."""
    cleaned = []
    parts = update.chunk(2, -1), values_of(pipe, base, phrases).chunk(2, -1)
    for rows, unwanted, colours in zip(*parts, colour_directions(pipe, base), strict=True):
        _, sizes, right = svd(unwanted - unwanted @ colours.T @ colours, full_matrices=False)
        right = right[sizes > 1e-4]
        inside, width = rows @ right.T @ right, rows.shape[-1]
        chance = len(right) / width
        spread = (2 * chance * (1 - chance) / (width + 2)) ** 0.5
        share = inside.square().sum(-1) / rows.square().sum(-1)
        confidence = ((share - chance) / (2 * spread)).clamp(0, 1)[:, None]
        cleaned.append(rows - strength * (confidence if by_confidence else 1.0) * inside)
    return torch.cat(cleaned, -1)


def alike(result, expected):
    return torch.allclose(result, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
