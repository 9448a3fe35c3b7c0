"""FLUX.3 from pictures to pictures: learned on a modular base, loaded, merged, gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from safetensors.torch import load_file

from customize.cli.base_pipeline import load_base_pipeline
from customize.concepts.io.read_concept import load_concept
from customize.errors import PipelineError
from customize.training.recipe import train
from tests.pipeline.making import assert_same, everything
from tests.tiny import tiny_flux3
from tests.training.runs import assert_unchanged, settings, snapshot

PROMPT = "a photo of <rex> on the beach"


def draw(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return pipe(prompt=prompt, generator=noise, output="images", **call)[0]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and, learned on it, the concepts rex and tom."""
    folder = tmp_path_factory.mktemp("flux3")
    tiny_flux3().save_pretrained(str(folder / "base"), overwrite_modular_index=True)
    for name in ("rex", "tom"):
        config = settings(
            folder,
            output=f"concepts/{name}",
            base=str(folder / "base"),
            name=name,
            library=folder / "concepts",
            validation_prompts=["a photo of <rex>"],
            validation_steps=2,
            prior_weight=1.0,
            prior_count=2,
        )
        train(config, progress=False)
    return folder


def test_training_on_components_leaves_them_unchanged(tmp_path: Path) -> None:
    pipe = tiny_flux3()
    before = snapshot(pipe.components)
    concept = train(settings(tmp_path), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    assert concept.info.family == "flux3" and not concept.embeddings
    assert {key: len(updates) for key, updates in concept.updates.items()} == {"transformer": 16}
    assert all(update.up.any() for update in concept.updates["transformer"].values())


def test_concepts_are_loaded_merged_and_unloaded(learned: Path) -> None:
    pipe = tiny_flux3()
    base, before = draw(pipe), everything(pipe)
    rex, tom = learned / "concepts" / "rex", learned / "concepts" / "tom"
    pipe.load_custom(rex)
    alone = draw(pipe)
    assert np.abs(alone - base).max() > 1e-3
    pipe.load_custom(tom, weights=[0.5])
    both = draw(pipe)
    assert np.abs(both - alone).max() > 1e-4
    assert [(row.name, row.weight, row.slices) for row in pipe.custom.rows] == [
        ("rex", 1.0, "disjoint"),
        ("tom", 0.5, "disjoint"),
    ]
    pipe.load_custom(weights={"rex": 1.0, "tom": 0.5}, fuse=True)
    np.testing.assert_allclose(draw(pipe), both, atol=2e-4)
    pipe.unload_custom("tom")
    np.testing.assert_allclose(draw(pipe), alone, atol=2e-4)
    pipe.unload_custom()
    assert_same(before, everything(pipe))
    assert np.array_equal(draw(pipe), base)


def test_stock_diffusers_reads_the_concept(learned: Path) -> None:
    pipe, stock = tiny_flux3(), tiny_flux3()
    pipe.load_custom(learned / "concepts" / "rex")
    stock.load_lora_weights(str(learned / "concepts" / "rex"))
    np.testing.assert_allclose(draw(stock), draw(pipe), atol=1e-5)


def test_concepts_fit_the_distilled_model(learned: Path) -> None:
    pipe = tiny_flux3(flow_map=True)
    pipe.load_custom(learned / "concepts" / "rex")
    weight = load_file(learned / "concepts" / "rex" / "pytorch_lora_weights.safetensors")
    assert len(weight) == 2 * 16 and len(pipe.custom.rows) == 1
    pipe.unload_custom()
    assert pipe.custom.rows == ()


def test_snippets_of_the_model_card_run(learned: Path) -> None:
    concept = load_concept(learned / "concepts" / "rex")
    assert concept.info.base == str(learned / "base")
    card = (learned / "concepts" / "rex" / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 2
    pictures = []
    for code in snippets:
        code = code.replace("FOLDER", str(learned / "concepts" / "rex"))
        code = code.replace('output="images"', 'output="images", **small()')
        *lines, last = code.strip().splitlines()
        names: dict[str, Any] = {"small": _small}
        exec("\n".join([*lines, f"picture = {last}"]), names)
        assert isinstance(names["pipe"], ModularPipeline)
        pictures.append(np.asarray(names["picture"], dtype=float))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # of 255
    pipe = tiny_flux3()
    bare = pipe(prompt="a photo of <rex>", output="images", **_small())[0]
    assert np.abs(pictures[0] - np.asarray(bare, dtype=float)).max() > 1


def test_commands_for_standard_pipelines_refuse_modular_bases(learned: Path) -> None:
    with pytest.raises(PipelineError, match=r"as a modular pipeline.*Fix: use it in Python"):
        load_base_pipeline(str(learned / "base"), torch.device("cpu"), None)


def _small() -> dict[str, Any]:
    noise = torch.Generator().manual_seed(3)
    return {"num_inference_steps": 2, "height": 32, "width": 32, "generator": noise}
