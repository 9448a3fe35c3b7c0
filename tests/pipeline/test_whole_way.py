"""Stable Diffusion XL from pictures to pictures: learned, read by stock diffusers, loaded, gone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from customize.concepts.io.read_concept import load_concept
from customize.training.recipe import train
from tests.forked import run_forked
from tests.pipeline.making import PROMPT, assert_same, draw, everything
from tests.tiny import tiny_sdxl
from tests.training.runs import assert_unchanged, settings, snapshot

STOCK = """
import sys, warnings
warnings.simplefilter("error")  # peft warns where a file and its header disagree
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
import numpy as np, torch
from safetensors.torch import load_file
from tests.tiny import tiny_sdxl

torch.set_num_threads(1)
pipe = tiny_sdxl()
pipe.load_lora_weights(sys.argv[1])
rows = load_file(sys.argv[1] + "/learned_embeds.safetensors")
pipe.load_textual_inversion(
    rows["clip_l"], token="<rex>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
)
pipe.load_textual_inversion(
    rows["clip_g"], token="<rex>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
)
pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
noise = torch.Generator().manual_seed(1)
picture = pipe(sys.argv[2], num_inference_steps=2, generator=noise, output_type="np").images[0]
np.save(sys.argv[3], picture)
assert "customize" not in sys.modules
"""


def test_train_load_and_generate_with_sdxl(tmp_path: Path) -> None:
    pipe = tiny_sdxl()
    before = snapshot(pipe.components)
    config = settings(
        tmp_path,
        steps=10,
        num_tokens=2,
        text_learning_rate=1e-2,
        validation_prompts=["a photo of <rex>"],
        validation_steps=2,
        prior_weight=1.0,
        prior_count=2,
    )
    learned = train(config, pipe.components, progress=False)
    assert_unchanged(before, pipe.components)
    counts = {component: len(updates) for component, updates in learned.updates.items()}
    assert counts == {"unet": 64, "text_encoder": 8, "text_encoder_2": 8}
    still = [
        (component, module)
        for component, updates in learned.updates.items()
        for module, update in updates.items()
        if not update.up.any()
    ]
    # The first encoder is read before its last layer, and not pooled.
    assert {component for component, _ in still} == {"text_encoder"}
    assert {module.partition("layers.")[2][0] for _, module in still} == {"1"}
    stored = load_concept(config.output)
    assert {key: tuple(rows.shape) for key, rows in stored.embeddings.items()} == {
        "text_encoder": (2, 16),
        "text_encoder_2": (2, 24),
    }

    whole, base = everything(pipe), draw(pipe)
    pipe.load_custom(config.output)
    ours = draw(pipe)
    assert np.abs(ours - base).max() > 1e-2
    result = tmp_path / "stock.npy"
    done = run_forked(STOCK, config.output, PROMPT, result)
    assert done.returncode == 0, done.stderr
    assert "No LoRA keys" not in done.stderr
    assert np.abs(np.load(result) - ours).max() <= 1e-5
    pipe.unload_custom()
    assert_same(whole, everything(pipe))
    assert np.array_equal(draw(pipe), base)
