"""The bundled assets: base, judges and the concepts' images."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from customize import Rewriter
from customize.demo.experiment import NAMES
from customize.evaluation.storybook_rates import attribute_accuracy, draw_prompts
from customize.storybook.bundled_assets import assets_folder, rewriter_folder
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import judge_inputs, load_judges
from customize.storybook.user_prompts import KINDS, SYNONYMS, write_user_prompt
from customize.storybook.world import CLASSES
from scripts.storybook_training.measure_judges import measure_judges

PROMPTS = (
    "a photo of a red dog wearing a hat on a beach",
    "a photo of a blue robot in the snow",
    "a photo of a white cat wearing glasses in a forest",
    "a photo of a green car in a city",
)


def test_the_base_opens_in_plain_diffusers_and_follows_prompts():
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook")
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    accuracy = attribute_accuracy(
        load_judges(assets_folder() / "judges"), draw_prompts(pipe, PROMPTS, seed=1), PROMPTS
    )
    assert accuracy["all"] >= 0.8 and accuracy["class"] >= 0.75


def test_accuracy_of_the_judges():
    vae = DiffusionPipeline.from_pretrained(assets_folder() / "storybook").vae
    figures = measure_judges(
        load_judges(assets_folder() / "judges"), vae, pictures=60, identities=32
    )
    assert figures["clean_accuracy"] > 0.97 and figures["rough_accuracy"] > 0.94
    assert figures["identity_auc"] > 0.97


def test_the_bundled_images_show_their_concepts():
    judges = load_judges(assets_folder() / "judges")
    prototypes = {n: judges.prototype(judge_inputs(bundled_concept(n).images())) for n in NAMES}
    for name in NAMES:
        files = sorted((assets_folder() / "concepts" / name).glob("*.png"))
        assert len(files) == 5
        pictures = bundled_concept(name).images()
        for other, prototype in prototypes.items():
            distance = judges.distance(judge_inputs(pictures), prototype)
            near = (distance <= judges.threshold).float().mean().item()
            assert near >= 0.8 if other == name else near <= 0.2


def test_the_weights_stay_small():
    sizes: dict[str, int] = {}
    for file in assets_folder().rglob("*.safetensors"):
        part = file.relative_to(assets_folder()).parts[0]
        sizes[part] = sizes.get(part, 0) + file.stat().st_size
    limits = {
        "storybook": 23 * 2**20,
        "storybook-wide": 23 * 2**20,
        "judges": 2 * 2**20,
        "stickers": 25 * 10**6,
        "references": 10 * 10**6,
        "rewriter": 10 * 10**6,
    }
    assert sizes.keys() == limits.keys()
    for part, size in sizes.items():
        assert 0 < size < limits[part], part


def test_the_wide_base_draws_two_things_in_wide_pictures_and_one_in_square_ones():
    pipe = DiffusionPipeline.from_pretrained(assets_folder() / "storybook-wide")
    pipe.set_progress_bar_config(disable=True)
    judges = load_judges(assets_folder() / "judges")
    alone = attribute_accuracy(judges, draw_prompts(pipe, PROMPTS, seed=1), PROMPTS)
    assert alone["all"] >= 0.8 and alone["class"] >= 0.75
    prompts = [
        "a photo of a red dog and a blue cup on a beach",
        "a photo of a white cat and a green car in a city",
    ]
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    wide = pipe(prompts, width=128, height=64, generator=seeds, output_type="pt").images * 2 - 1
    for part, classes in ((wide[..., :64], ["dog", "cat"]), (wide[..., 64:], ["cup", "car"])):
        logits = judges.attributes(part)["kind0"]
        assert [CLASSES[k] for k in logits.argmax(-1).tolist()] == classes


def test_the_bundled_language_model_says_prompts_in_the_words_of_the_base():
    rewriter = Rewriter.from_pretrained(rewriter_folder())
    prompts = [
        write_user_prompt(np.random.default_rng((31, number)), kind)
        for kind in KINDS[:-1]  # without exclusions, whose words stay or go
        for number in range(6)
    ]
    texts = [each.text for each in rewriter.rewrite([prompt.text for prompt in prompts])]
    unseen = {word for words in SYNONYMS.values() for word in words}
    right = []
    for prompt, text in zip(prompts, texts, strict=True):
        asked = {prompt.request.background, *(w for t in prompt.request.things for w in astuple(t))}
        words = set(text.replace(",", "").replace(";", "").split())
        right.append(asked - {None, "none"} <= words and not words & unseen)
    assert sum(right) >= 0.8 * len(prompts)
