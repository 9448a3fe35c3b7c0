"""Concepts that fit a tiny pipeline, and all that a pipeline is made of, for comparing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
from diffusers.pipelines.auto_pipeline import _get_model
from torch import Tensor, nn

from customize.concepts.concept_info import BasisInfo, ConceptInfo
from customize.concepts.slices.allocation import slice_columns
from customize.concepts.types import Concept
from customize.core.bases import BASES, down_projection
from customize.core.lowrank import LowRank
from customize.families import family_of
from customize.pipeline.state import get_state
from tests.tiny import drawn, tiny_sd, tiny_sd3, tiny_sdxl

PROMPT = "a photo of <rex> on the beach"
MAKERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3}

#: What transformers notes on a model in its first call that asks for hidden states.
NOTES = {"_output_capturing_hooks_installed"}


def concept(pipe: Any, name: str = "rex", *, index: int = 0, **changes: Any) -> Concept:
    """A concept with random updates of every layer, and two tokens where tokens can be added."""
    family = family_of(pipe.components, pipe.config)
    seed = sum(name.encode()) + 1000 * index
    generator = torch.Generator().manual_seed(seed)
    components = [*family.denoisers, *family.text_encoders]
    targets = {component: family.adapter_targets(component) for component in components}
    widths = {shape[1] for shapes in targets.values() for shape in shapes.values()}
    columns = slice_columns(widths, 2, index=index, name=name)
    facts: dict[str, Any] = {
        "name": name,
        "trigger": f"<{name}>",
        "class_word": "dog",
        "family": family.name,
        "base": "tiny",
        "fingerprint": family.fingerprint(),
        "basis": BasisInfo(),
        "rank": 2,
        "alpha": 4.0,
        "slices": {str(width): list(indices) for width, indices in columns.items()},
        "num_tokens": 2 if family.token_dictionaries() else 0,
    }
    info = ConceptInfo(**facts | changes)

    downs = {
        width: down_projection(BASES["cosine"], width, slice_, 0)
        for width, slice_ in columns.items()
    }

    def update(out: int, width: int) -> LowRank:
        up = 0.2 * torch.randn(out, 2, generator=generator)
        return LowRank(up, downs[width].clone(), info.scale)

    products = {
        component: {module: update(*shape) for module, shape in shapes.items()}
        for component, shapes in targets.items()
    }
    rows = {
        dictionary.key: torch.randn(2, table(dictionary.text_encoder).shape[1], generator=generator)
        for dictionary in family.token_dictionaries()
    }
    return Concept(info, products, rows)


def table(text_encoder: Any) -> Tensor:
    return text_encoder.get_input_embeddings().weight


def draw(pipe: Any, prompt: str = PROMPT, **call: Any) -> np.ndarray:
    """Draw without ``together=``, which the tests of its stage are about."""
    if get_state(pipe) is not None and not isinstance(pipe, diffusers.ModularPipeline):
        call = {"together": False} | call
    noise = torch.Generator().manual_seed(1)
    usual = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    return drawn(pipe, prompt, generator=noise, **usual | call)[0]


def modular(pipe: Any, without: Sequence[str] = (), **arguments: Any) -> Any:
    """A modular pipeline of the same parts as a standard, or another modular, one.

    Args:
        without: names of blocks to leave out.
        arguments: for ``init_pipeline``.
    """
    if isinstance(pipe, diffusers.ModularPipeline):
        blocks = pipe.blocks
    else:
        name = _get_model(type(pipe).__name__)
        kind = getattr(diffusers, MODULAR_PIPELINE_MAPPING[name](dict(pipe.config)))
        blocks = getattr(diffusers, kind.default_blocks_name)()
    for name in without:
        blocks.sub_blocks.pop(name)
    made = blocks.init_pipeline(**arguments)
    parts = {key: part for key, part in pipe.components.items() if part is not None}
    made.update_components(**{key: parts[key] for key in parts if key in made.components})
    return made


def user_lora(pipe: Any, seed: int = 9) -> dict[str, Tensor]:
    """A LoRA of a user's own, on a part of the layers, as ``load_lora_weights`` takes it."""
    family = family_of(pipe.components)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module, (out, width) in family.adapter_targets(family.denoiser_key).items():
        if module.endswith(("to_q", "add_q_proj")):
            key = f"{family.denoiser_key}.{module}"
            state[f"{key}.lora_A.weight"] = torch.randn(3, width, generator=generator)
            state[f"{key}.lora_B.weight"] = 0.1 * torch.randn(out, 3, generator=generator)
    return state


def everything(pipe: Any) -> dict[str, Any]:
    """Weights, modules, flags, vocabularies and classes of a pipeline, copied."""
    attributes = [name for name in vars(pipe) if "custom" in name]  # a call leaves notes of its own
    facts: dict[str, Any] = {"class": type(pipe), "attributes": attributes}
    for key, part in pipe.components.items():
        facts[key] = type(part)
        if isinstance(part, nn.Module):
            facts[f"{key} weights"] = {k: v.clone() for k, v in part.state_dict().items()}
            facts[f"{key} modules"] = {k: type(m) for k, m in part.named_modules()}
            facts[f"{key} flags"] = {k: p.requires_grad for k, p in part.named_parameters()}
            facts[f"{key} attributes"] = sorted(vars(part).keys() - NOTES)
            facts[f"{key} adapters"] = {
                k: (list(m.active_adapters), sorted(m.lora_A))
                for k, m in part.named_modules()
                if hasattr(m, "active_adapters") and hasattr(m, "lora_A")
            }
            facts[f"{key} config"] = str(part.config)
            facts[f"{key} ends"] = [
                m.eos_token_id for m in part.modules() if hasattr(m, "eos_token_id")
            ]
        elif hasattr(part, "get_vocab"):
            state = json.loads(part.backend_tokenizer.to_str())
            del state["truncation"], state["padding"]  # of the latest call
            facts[f"{key} state"] = state
            facts[f"{key} length"] = len(part)
            facts[f"{key} attributes"] = sorted(vars(part))
    return facts


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, left in a.items():
        if key.endswith(" weights"):
            right = b[key]
            assert left.keys() == right.keys(), key
            for name, weight in left.items():
                assert weight.dtype == right[name].dtype and torch.equal(weight, right[name]), name
        else:
            assert left == b[key], key


def attached(make: Any = tiny_sd, layers: bool = False, **facts: Any) -> Any:
    """A pipeline with <rex>, whose tokens may have an embedding for each cross-attention layer."""
    pipe = make()
    rex = concept(pipe, **facts)
    if layers:
        count = len(family_of(pipe.components).cross_attention_layers())
        noise = torch.Generator().manual_seed(3)
        rows = {
            key: embeddings[:, None]
            + 0.5 * torch.randn(2, count, embeddings.shape[1], generator=noise)
            for key, embeddings in rex.embeddings.items()
        }
        info = rex.info.model_copy(update={"token_layers": count})
        rex = Concept(info, rex.updates, rows)
    return pipe.load_custom(rex)
