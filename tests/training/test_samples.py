"""Samples of a concept during training, and the loss on fixed noise."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from customize.concepts.io.read_concept import load_concept
from customize.training import samples
from customize.training.config import TrainConfig
from customize.training.recipe import train, train_jointly
from tests.tiny import tiny_sd
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import (
    Stop,
    assert_unchanged,
    crash_at,
    make_pictures,
    same,
    settings,
    snapshot,
    tensors,
)

NAMES = ["base", "step-000000", "step-000003", "step-000006", "step-000009", "step-000012"]


def drawn(folder):
    return {path.stem: path.read_bytes() for path in sorted((folder / "samples").iterdir())}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)), np.float64)


@pytest.fixture
def few_steps(monkeypatch):
    """Samples of short runs take 2 steps instead of 5."""
    monkeypatch.setattr(samples, "_MIN_STEPS", 2)


@pytest.fixture
def counted(monkeypatch):
    """Collect the names of generated samples in order."""
    names = []
    draw = samples.SampleImages._draw

    def noting(self, prompt, path):
        names.append(path.stem)
        draw(self, prompt, path)

    monkeypatch.setattr(samples.SampleImages, "_draw", noting)
    return names


@pytest.mark.usefixtures("few_steps")
def test_samples_are_in_the_output_folder_and_the_card(tmp_path, counted):
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    state = torch.get_rng_state()
    concept = train(settings(tmp_path, samples=True), pipe.components, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(before, pipe.components)
    assert counted == NAMES and list(drawn(tmp_path / "out")) == NAMES
    with Image.open(tmp_path / "out" / "sample-1.png") as strip:
        assert strip.size == (6 * 32, 32)
        cells = [np.asarray(strip)[:, 32 * k : 32 * k + 32].astype(np.float64) for k in range(6)]
    for cell, data in zip(cells, drawn(tmp_path / "out").values(), strict=True):
        assert np.array_equal(cell, pixels(data))
    facts = concept.info.training["samples"]
    assert facts == {
        "prompt": "a photo of <rex>",
        "base_prompt": "a photo of a dog",
        "steps": [0, 3, 6, 9, 12],
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "sample-1.png" in card
    assert (
        "the base's own a photo of a dog; a photo of &#60;rex&#62; after 0, 3, 6, 9, 12 st" in card
    )
    # The last sample differs from the first, and the base's from both.
    first, last = (pixels(drawn(tmp_path / "out")[name]) for name in (NAMES[1], NAMES[-1]))
    assert np.abs(first - last).max() > 0
    # The base's sample equals an image of the base without adapters.
    other = train(
        settings(tmp_path, "other", samples=True, steps=1, seed=0), pipe.components, progress=False
    )
    assert drawn(tmp_path / "other")["base"] == drawn(tmp_path / "out")["base"]
    assert other.info.training["samples"]["steps"] == [0, 1]


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("live", [True, False])
def test_a_run_gives_the_same_with_and_without_samples(live, tmp_path):
    pipe = tiny_sd()
    changes = {
        "train_tokens": live,
        "train_text_encoder": live,
        "preserve": {"context_output": 1.0},
    }
    changes |= {"flip": True, "caption_dropout": 0.3}
    with_, without = (
        train(settings(tmp_path, str(on), samples=on, **changes), pipe.components, progress=False)
        for on in (True, False)
    )
    assert same(tensors(with_), tensors(without))
    assert without.info.training.keys() == with_.info.training.keys() - {"samples", "fixed_loss"}
    assert not (tmp_path / "False" / "samples").exists()


@pytest.mark.usefixtures("few_steps")
def test_a_resumed_run_repeats_no_sample(tmp_path, counted):
    pipe = tiny_sd()
    config = settings(tmp_path, samples=True, checkpoint_every=4)
    with pytest.raises(Stop):
        train(config, pipe.components, progress=False, on_step=crash_at(7))
    assert counted == NAMES[:4]  # resumes from step 4, before the sample of step 6
    concept = train(config, pipe.components, progress=False)
    assert counted == NAMES
    whole = train(settings(tmp_path, "whole", samples=True), pipe.components, progress=False)
    assert drawn(tmp_path / "out") == drawn(tmp_path / "whole")
    facts = [c.info.training["fixed_loss"] for c in (concept, whole)]
    assert facts[0] == facts[1]
    # A new run generates all samples; samples may be enabled and disabled between runs.
    counted.clear()
    train(config.model_copy(update={"resume": False}), pipe.components, progress=False)
    assert counted == NAMES


def test_a_failed_sample_disables_samples_without_ending_the_run(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB\nmore")

    monkeypatch.setattr(samples, "sample", full)
    with pytest.warns(UserWarning, match=r"samples of rex are not drawn any more: CUDA out of mem"):
        train(settings(tmp_path, samples=True), tiny_sd().components, progress=False)
    assert "fixed_loss" in load_concept(tmp_path / "out").info.training
    assert not (tmp_path / "out" / "sample-1.png").exists()


def test_decoding_falls_back_to_the_cpu(tmp_path, monkeypatch):
    seen = []
    decode = samples.decode_images

    def small(family, latents):
        seen.append(latents.device.type)
        if len(seen) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(family, latents)

    monkeypatch.setattr(samples, "decode_images", small)
    train(settings(tmp_path, samples=True, steps=1), tiny_sd().components, progress=False)
    assert seen == ["cpu"] * 6 and len(drawn(tmp_path / "out")) == 3


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("make", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
def test_every_family_has_samples_and_a_fixed_loss(make, tmp_path):
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    config = settings(tmp_path, samples=True, steps=2)
    concept = train(config, pipe.components, progress=False, pipeline_config=pipe.config)
    assert_unchanged(before, pipe.components, pipe.config)
    assert concept.info.training["samples"]["steps"] == [0, 1, 2]
    loss = concept.info.training["fixed_loss"]
    assert 0 < loss["learned"] < 10 and 0 < loss["base"] < 10


@pytest.mark.slow
def test_samples_run_without_compilation(tmp_path, monkeypatch):
    """Compilation of the shapes of samples would be for a few calls only."""
    from customize.training import compile_blocks

    monkeypatch.setattr(compile_blocks, "_BACKEND", "aot_eager")
    torch._dynamo.reset()
    counts = {}
    for on in (True, False):
        torch._dynamo.utils.counters.clear()
        config = settings(tmp_path, str(on), samples=on, compile=True, steps=3)
        train(config, tiny_sd().components, progress=False)
        counts[on] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.reset()
    assert counts[True] == counts[False] > 0


@pytest.mark.usefixtures("few_steps")
def test_concepts_of_one_run_have_separate_samples(tmp_path):
    make_pictures(tmp_path / "images")
    configs = [
        settings(tmp_path, name, samples=True, name=name, steps=2, class_word=word)
        for name, word in (("rex", "dog"), ("tom", "cat"))
    ]
    concepts = train_jointly(configs, tiny_sd().components, progress=False)
    assert [c.info.training["samples"]["base_prompt"] for c in concepts] == [
        "a photo of a dog",
        "a photo of a cat",
    ]
    assert all((tmp_path / name / "sample-1.png").is_file() for name in ("rex", "tom"))


@pytest.mark.usefixtures("quick_recordings")
def test_nothing_but_defaults(tmp_path, capsys):
    """Samples, shared directions, preservation and recording are enabled by default."""
    make_pictures(tmp_path / "photos")
    needed = {"base": "tiny", "name": "rex", "class_word": "dog", "images": tmp_path / "photos"}
    config = TrainConfig(**needed, output=tmp_path / "out", steps=3)
    train(config, tiny_sd().components)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("rex: ") and "loss on fixed noise" in last
    assert (tmp_path / "out" / "layer_inputs.safetensors").is_file()
    facts = json.loads((tmp_path / "out" / "concept.json").read_text())["training"]
    assert facts["samples"]["steps"] == [0, 1, 2, 3] and facts["fixed_loss"]["base"] > 0


@pytest.mark.parametrize(
    ("steps", "batch", "expected"), [(1, 1, 5), (100, 2, 10), (200, 2, 20), (10_000, 8, 20)]
)
def test_sampling_steps_are_bounded_in_short_runs(steps, batch, expected, tmp_path):
    from customize.families import family_of

    config = settings(tmp_path, steps=steps, batch_size=batch)
    assert samples.choose_sampling_steps(config, family_of(tiny_sd().components)) == expected
