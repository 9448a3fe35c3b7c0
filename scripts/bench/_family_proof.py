"""Read with stock diffusers what `families.py` trained: `_family_proof.py FOLDER`.

FOLDER has a subfolder per family, with its tiny `base` and a concept in `PROVED/0`. This script
never imports customize. The last line printed is a JSON object: subfolder -> result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROVED = "ours, orthogonal"
#: As the model card of a concept has it.
FILES = {
    "pytorch_lora_weights.safetensors": ("", {}),
    "pytorch_lora_weights_2.safetensors": ("_2", {"load_into_transformer_2": True}),
}


def opened(base: Path) -> Any:
    """The base as a pipeline of stock diffusers."""
    from diffusers import DiffusionPipeline, ModularPipeline

    if (base / "model_index.json").is_file():
        return DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    blocks = ModularPipeline.from_pretrained(str(base)).blocks
    blocks.sub_blocks.pop("prompt_upsampler", None)
    pipe = blocks.init_pipeline(str(base))
    pipe.load_components()
    return pipe


def picture(pipe: Any) -> np.ndarray:
    from tests.tiny import drawn

    noise = torch.Generator().manual_seed(1)
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    results: np.ndarray = drawn(pipe, "a photo of <rex>", generator=noise, **call)[0]
    return results


def proof(folder: Path) -> dict[str, Any]:
    """Load the concept; return whether the model has all of it, and how much an image changes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    (concept,) = (folder / PROVED / "0").rglob("concept.json")
    family = json.loads(concept.read_text())["family"]
    pipe = opened(folder / "base")
    before = picture(pipe)
    whole = True
    for name, (which, flags) in FILES.items():
        if not (file := concept.with_name(name)).is_file():
            continue
        pipe.load_lora_weights(concept.parent, weight_name=name, adapter_name="rex", **flags)
        part = "unet" if hasattr(pipe, "unet") else f"transformer{which}"
        learned = load_file(file)
        there = get_peft_model_state_dict(getattr(pipe, part), adapter_name="rex")
        prefix = f"{part.removesuffix(which)}."
        whole &= {prefix + key for key in there} == learned.keys()
        whole &= all(torch.equal(there[key.removeprefix(prefix)], learned[key]) for key in learned)
    after = picture(pipe)
    change = float(np.abs(after - before).max())
    return {"family": family, "read_whole": whole, "picture_change": change}


def main() -> None:
    import tests.tiny_llm
    import tests.tiny_video  # noqa: F401  diffusers loads text processors only from what is imported

    torch.set_num_threads(1)
    results = {folder.name: proof(folder) for folder in sorted(Path(sys.argv[1]).iterdir())}
    assert "customize" not in sys.modules
    print(json.dumps(results))


if __name__ == "__main__":
    main()
