"""Small training runs for tests: few smooth images, few steps, high learning rates."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from customize.concepts.types import Concept
from customize.families import Family, family_of
from customize.families.pipeline_components import NO_CONFIG
from customize.training.config import TrainConfig
from customize.training.data.dataset import TrainingImage
from customize.training.progress import Progress
from customize.training.run import Run
from customize.training.training_inputs import read_data

#: A run of 12 steps takes about half a second.
SMALL: dict[str, Any] = {
    "base": "tiny",
    "name": "rex",
    "class_word": "dog",
    "rank": 4,
    "resolution": 32,
    "steps": 12,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "text_learning_rate": 1e-3,
    "token_learning_rate": 1e-2,
    "checkpoint_every": 0,
    "log_every": 5,
    # These would take at least as long as the run itself.
    "preserve": {},
    "num_shared_directions": 0,
    "record_inputs": False,
    "samples": False,
}


class Stop(Exception):
    """An exception that interrupts a run like a crash."""


def crash_at(step: int) -> Callable[[int, object], None]:
    """Return a function for ``on_step`` that raises :class:`Stop` after this step."""

    def on_step(done: int, loss: object) -> None:
        if done == step:
            raise Stop

    return on_step


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    """Return an image of two ramps and a tint by seed."""
    x = np.linspace(0, 255, side)[None, :].repeat(side, 0)
    tint = np.full((side, side), (83 * seed) % 256)
    return Image.fromarray(np.stack([x, x.T, tint], -1).round().astype(np.uint8))


def make_pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
    return folder


def make_various(
    folder: Path,
    sizes: Sequence[tuple[int, int]] = ((48, 32), (32, 32), (20, 80), (49, 33), (64, 16)),
) -> Path:
    """Write images of these (width, height) to "images", and a mask of each to "masks"."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for number, size in enumerate(sizes):
            picture(number, 80).resize(size).save(folder / kind / f"{number}.png")
    return folder


def settings(folder: Path, output: str = "out", **changes: Any) -> TrainConfig:
    """Return the configuration of a small run in a test's folder."""
    images = folder / "images"
    if not images.exists():
        make_pictures(images)
    return TrainConfig(**{**SMALL, "images": images, "output": folder / output, **changes})


def read_images(config: TrainConfig) -> list[TrainingImage]:
    """Read the training images of a configuration."""
    (images,) = read_data([config], None, Progress(False)).images
    return images


def make_run(configs: Sequence[TrainConfig], family: Family) -> Run:
    """Return a run on a model in memory, on the CPU, without adapters."""
    run = Run(
        configs,
        Accelerator(cpu=True),
        torch.device("cpu"),
        nullcontext,
        Progress(False),
        ExitStack(),
        owns_base=False,
        weights={},
    )
    run.family = family
    return run


def tensors(concept: Concept) -> dict[str, Tensor]:
    """Return all tensors of a concept by name."""
    named = {f"tokens.{key}": rows for key, rows in concept.embeddings.items()}
    for component, updates in concept.updates.items():
        for module, update in updates.items():
            named[f"{component}.{module}.up"] = update.up
            named[f"{component}.{module}.down"] = update.down
    return named


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(
    components: Mapping[str, Any], pipeline_config: Mapping[str, Any] = NO_CONFIG
) -> dict[str, Any]:
    """All of a model that training touches: weights, modes, flags, vocabularies, module types.

    The first prompt ever sets a tokenizer's padding and transformers' own hooks, and the first
    picture an autoencoder's caches: one of each goes before.
    """
    family = family_of(components, pipeline_config)
    with torch.no_grad():
        family.encode_prompts(["a"])
        mean, _ = family.encode_images(torch.zeros(1, 3, 32, 32))
        family.decode_latents(mean)
    state: dict[str, Any] = {}
    for key, part in components.items():
        if isinstance(part, torch.nn.Module):
            state[f"{key} weights"] = {k: v.clone() for k, v in part.state_dict().items()}
            state[f"{key} grads"] = {k: p.requires_grad for k, p in part.named_parameters()}
            state[f"{key} modules"] = [
                (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                for name, m in part.named_modules()
            ]
            state[f"{key} marks"] = sorted(part.__dict__)
        elif hasattr(part, "backend_tokenizer"):
            state[f"{key} vocabulary"] = part.backend_tokenizer.to_str()
    return state


def assert_unchanged(
    before: dict[str, Any],
    components: Mapping[str, Any],
    pipeline_config: Mapping[str, Any] = NO_CONFIG,
) -> None:
    after = snapshot(components, pipeline_config)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if key.endswith(" weights"):
            assert same(value, after[key]), key
        else:
            assert value == after[key], key
