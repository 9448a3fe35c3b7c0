import pytest
import torch
from safetensors.torch import load_file

from customize.concepts.concept_info import BasisInfo
from customize.concepts.io.file_layout import EMBEDS_FILE
from customize.concepts.io.read_concept import load_concept
from customize.concepts.tokens.token_rows import initial_rows
from customize.concepts.types import Concept
from customize.errors import ConfigError
from customize.families import family_of
from customize.training.recipe import train
from customize.training.trainable import attach_trainable
from tests.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from tests.training.runs import assert_unchanged, same, settings, snapshot, tensors

LAYERS = 7
LONG = {"steps": 6, "checkpoint_every": 3, "caption_dropout": 0.3, "layerwise_tokens": True}


def test_layers_learn_separate_embeddings(tmp_path):
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    losses: list[float] = []
    config = settings(
        tmp_path,
        layerwise_tokens=True,
        steps=4,
        prior_weight=0.5,
        prior_count=2,
        validation_prompts=("a photo of <rex>", "a dog"),
        validation_steps=2,
        gradient_checkpointing=True,
    )
    concept = train(config, pipe.components, False, lambda step, loss: losses.append(float(loss)))
    assert_unchanged(before, pipe.components)
    assert len(losses) == 4

    rows = concept.embeddings["text_encoder"]
    assert rows.shape == (2, LAYERS, 32) and concept.info.token_layers == LAYERS
    start = initial_rows(family_of(pipe.components).token_dictionaries()[0], "dog", 2, 0)
    assert (rows - start[:, None]).abs().amax(-1).min() > 1e-4  # every row has changed
    for a in range(LAYERS):
        for b in range(a):
            assert not torch.allclose(rows[:, a], rows[:, b], atol=1e-5), (a, b)

    loaded = load_concept(tmp_path / "out")
    assert same(tensors(loaded), tensors(concept))
    stock = load_file(tmp_path / "out" / EMBEDS_FILE)["<rex>"]
    assert torch.allclose(stock, rows.mean(1))


def test_conditions_of_a_layer_depend_on_its_embeddings_only(tmp_path):
    """Conditions and gradients of a layer depend only on its embeddings."""
    pipe = tiny_sd()
    family = family_of(pipe.components)
    pipe.text_encoder.requires_grad_(False)
    config = settings(tmp_path, layerwise_tokens=True)
    with attach_trainable(family, [config], [None], BasisInfo(), {}) as trainable:
        texts = trainable.layer_prompts("a photo of <rex>")
        assert texts[3] == "a photo of <rex@3> <rex@3>_1" and len(texts) == LAYERS
        assert trainable.layer_prompts("a dog") == ["a dog"] * LAYERS
        rows = trainable.concepts[0].token_rows["text_encoder"].parameter
        assert rows.shape == (LAYERS * 2, 32)
        family.encode_prompts(texts)["prompt_embeds"][3].square().sum().backward()
        assert rows.grad is not None
        touched = rows.grad.unflatten(0, (LAYERS, 2)).abs().amax((1, 2)) > 0
        assert touched.nonzero().tolist() == [[3]]
        assert pipe.text_encoder.get_input_embeddings().weight.grad is None

        # If every layer read all parts as one sequence, their order would not matter.
        parts = torch.randn(LAYERS, 24, 32, generator=torch.Generator().manual_seed(0))
        noisy, t = torch.zeros(1, 4, 16, 16), torch.tensor([500])
        drawn, turned = (
            family.predict(noisy, t, {"prompt_embeds": order.reshape(1, -1, 32)})
            for order in (parts, parts.flip(0))
        )
        assert (drawn - turned).abs().max() > 1e-3


def test_a_resumed_run_gives_the_uninterrupted_result(tmp_path):
    def run(output: str, **changes) -> Concept:
        config = settings(tmp_path, output, **{**LONG, **changes})
        return train(config, tiny_sd().components, progress=False)

    whole = run("whole")

    def stop(step: int, loss: object) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "cut", **LONG), tiny_sd().components, False, stop)
    assert same(tensors(run("cut")), tensors(whole))


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_sd3])
def test_layerwise_tokens_are_refused_by_other_families(make, tmp_path):
    pipe = make()
    before = snapshot(pipe.components)
    with pytest.raises(ConfigError, match="cannot have an embedding for each"):
        train(settings(tmp_path, layerwise_tokens=True), pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    assert not (tmp_path / "out").exists()
