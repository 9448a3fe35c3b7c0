"""Files of concepts in stock diffusers, in a process that never imports customize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from customize.concepts.io.write_concept import save_concept, write_single_file
from customize.concepts.types import Concept
from tests.concepts.making import learn
from tests.forked import run_forked
from tests.tiny import (
    drawn,
    tiny_flux,
    tiny_qwen_image,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_cogvideox, tiny_ltx2, tiny_wan

PROMPT = "a photo of <rex> on the beach"

STOCK = """
import sys, warnings
warnings.simplefilter("error")  # peft warns where a file and its header disagree
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)
import numpy as np, torch
from pathlib import Path
from tests.tiny import (
    drawn,
    tiny_flux,
    tiny_qwen_image,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
    tiny_z_image,
)
from tests.tiny_llm import tiny_flux2, tiny_flux2_klein, tiny_krea2, tiny_qwen_image_21
from tests.tiny_video import tiny_cogvideox, tiny_ltx2, tiny_wan

torch.set_num_threads(1)
root = Path(sys.argv[1])

def draw(pipe, prompt):
    noise = torch.Generator().manual_seed(1)
    size = {"height": 32, "width": 32}
    call = {"num_inference_steps": 2, "output_type": "np"} | size
    return drawn(pipe, prompt, generator=noise, **call)[0]

for name in ("orthogonal", "lora", "layerwise"):
    pipe = tiny_sd()
    pipe.load_lora_weights(str(root / name))
    pipe.load_textual_inversion(str(root / name))
    np.save(root / f"{name}.npy", draw(pipe, sys.argv[2]))

pipe = tiny_sd()
pipe.load_textual_inversion(str(root / "orthogonal"))
pipe.load_lora_weights(str(root / "single.safetensors"))
np.save(root / "single.npy", draw(pipe, sys.argv[2]))

pipe = tiny_sd3()
pipe.load_lora_weights(str(root / "sd3"))
np.save(root / "sd3.npy", draw(pipe, "a photo of a dog"))

pipe = tiny_flux()
pipe.load_lora_weights(str(root / "flux"))
pipe.load_textual_inversion(str(root / "flux"))
np.save(root / "flux.npy", draw(pipe, sys.argv[2]))

plain_words = {
    "qwen": tiny_qwen_image,
    "qwen_21": tiny_qwen_image_21,
    "z_image": tiny_z_image,
    "flux2": tiny_flux2,
    "klein": tiny_flux2_klein,
    "krea2": tiny_krea2,
}
for name, make in plain_words.items():
    pipe = make()
    pipe.load_lora_weights(str(root / name))
    np.save(root / f"{name}.npy", draw(pipe, sys.argv[2]))

for name, make in {"wan": tiny_wan, "cogvideox": tiny_cogvideox, "ltx2": tiny_ltx2}.items():
    pipe = make()
    pipe.load_lora_weights(str(root / name))
    np.save(root / f"{name}.npy", draw(pipe, sys.argv[2]))

pipe = tiny_wan("2.2-14b")
pipe.load_lora_weights(str(root / "wan-14b.safetensors"))
pipe.transformer_2.load_lora_adapter(str(root / "wan-14b.safetensors"), prefix="transformer_2")
np.save(root / "wan-14b-single.npy", draw(pipe, sys.argv[2]))

# The lines of the model card, as a reader would type them, on a base with the published settings.
for name, make in {"sdxl": tiny_sdxl, "wan-14b": lambda: tiny_wan("2.2-14b")}.items():
    code = (root / name / "README.md").read_text().split("With diffusers alone:")[1]
    code = code.split("```python")[1].rpartition("pipe(")[0].replace("FOLDER", str(root / name))
    make().save_pretrained(root / f"{name}-base")
    names = {}
    exec(code.replace('"tiny"', repr(str(root / f"{name}-base"))), names)
    names["pipe"].set_progress_bar_config(disable=True)
    np.save(root / f"{name}.npy", draw(names["pipe"], sys.argv[2]))
assert "customize" not in sys.modules
"""


def draw(pipe, prompt: str) -> np.ndarray:
    noise = torch.Generator().manual_seed(1)
    size = {"height": 32, "width": 32}
    call = {"num_inference_steps": 2, "output_type": "np"} | size
    return drawn(pipe, prompt, generator=noise, **call)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> image of the pipeline with the concept, and image of stock diffusers."""
    root: Path = tmp_path_factory.mktemp("stock")
    ours = {}
    for name, alpha in (("orthogonal", 4.0), ("lora", 1.0)):
        pipe = tiny_sd()
        _, _, concept = learn(pipe, method=name, alpha=alpha)
        save_concept(concept, root / name)
        ours[name] = draw(pipe, PROMPT)
        if name == "orthogonal":
            # With embeddings for each of two layers; the image was drawn with their mean.
            rows = torch.tensor([[0.0], [2.0]]) * concept.embeddings["text_encoder"][:, None]
            info = concept.info.model_copy(update={"token_layers": 2})
            save_concept(Concept(info, concept.updates, {"text_encoder": rows}), root / "layerwise")
            ours["layerwise"] = ours[name]
            write_single_file(concept, root / "single.safetensors")
            ours["single"] = ours[name]
    pipe3 = tiny_sd3()
    _, _, concept = learn(pipe3, alpha=2.0)
    save_concept(concept, root / "sd3")
    ours["sd3"] = draw(pipe3, "a photo of a dog")
    others = {
        "sdxl": tiny_sdxl,
        "flux": tiny_flux,
        "qwen": tiny_qwen_image,
        "qwen_21": tiny_qwen_image_21,
        "z_image": tiny_z_image,
        "flux2": tiny_flux2,
        "klein": tiny_flux2_klein,
        "krea2": tiny_krea2,
        "wan": tiny_wan,
        "cogvideox": tiny_cogvideox,
        "ltx2": tiny_ltx2,
        "wan-14b": lambda: tiny_wan("2.2-14b"),
    }
    for name, make in others.items():
        pipe = make()
        _, _, concept = learn(pipe)
        save_concept(concept, root / name)
        ours[name] = draw(pipe, PROMPT)
        if name == "wan-14b":
            write_single_file(concept, root / "wan-14b.safetensors")
            ours["wan-14b-single"] = ours[name]
    done = run_forked(STOCK, root, PROMPT)
    assert done.returncode == 0, done.stderr
    assert "No LoRA keys" not in done.stderr
    return {name: (picture, np.load(root / f"{name}.npy")) for name, picture in ours.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("orthogonal", "lora", "single", "layerwise", "sd3", "sdxl", "flux", "qwen", "z_image"),
        *("qwen_21", "flux2", "klein", "krea2"),
        *("wan", "wan-14b", "wan-14b-single", "cogvideox", "ltx2"),
    ],
)
def test_stock_diffusers_gives_the_same_image(pictures, name: str) -> None:
    ours, stock = pictures[name]
    assert ours.shape == stock.shape
    assert np.abs(ours - stock).max() <= 1e-5


def test_images_depend_on_every_part(pictures) -> None:
    """Otherwise the test above would pass for a file without effect."""
    full = pictures["orthogonal"][0]

    def without(*components: str) -> np.ndarray:
        pipe = tiny_sd()
        _, adapter, _ = learn(pipe)
        for component in components:
            for layer in adapter.layers[component].values():
                layer.scaling[adapter.name] = 0.0
        return draw(pipe, PROMPT)

    assert np.abs(without() - full).max() <= 1e-5
    assert np.abs(without("unet") - full).max() > 1e-2
    assert np.abs(without("text_encoder") - full).max() > 1e-3
    pipe = tiny_sd()
    learn(pipe)
    assert np.abs(draw(pipe, "a photo of dog on the beach") - full).max() > 1e-3


def test_images_depend_on_both_denoisers(pictures) -> None:
    for component in ("transformer", "transformer_2"):
        pipe = tiny_wan("2.2-14b")
        _, adapter, _ = learn(pipe)
        for layer in adapter.layers[component].values():
            layer.scaling[adapter.name] = 0.0
        assert np.abs(draw(pipe, PROMPT) - pictures["wan-14b"][0]).max() > 1e-3


def test_sd3_card_has_no_trigger_for_stock_diffusers(tmp_path: Path) -> None:
    _, _, concept = learn(tiny_sd3())
    card = (save_concept(concept, tmp_path / "rex") / "README.md").read_text()
    ours, stock = card.split("With diffusers alone:")
    assert 'pipe(prompt="a photo of <rex>")' in ours
    assert (
        'pipe(prompt="a photo of a dog")' in stock and "no pipeline of this family reads" in stock
    )
