"""Drawing one picture of ``customize generate``, and writing it with its settings."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.atomic import put_file
from customize.cli.shared import storing
from customize.errors import PipelineError

if TYPE_CHECKING:
    from customize.cli.generate import Plan

_NUMBERED = re.compile(r"(\d{4,})\.(png|json)")


def draw(
    pipe: Any,
    prompt: str,
    seed: int,
    plan: Plan,
    guided: Mapping[str, Any],
    output: str,
) -> tuple[Any, dict[str, Any]]:
    """One picture, and all settings that it depends on.

    Args:
        guided: the call's arguments for guidance.
        output: where the call has it; of videos one frame is drawn.

    Raises:
        PipelineError: it is not finite, which would be stored as black.
    """
    import numpy as np
    import torch

    asked = {
        "num_inference_steps": plan.steps,
        **guided,
        "width": plan.size and plan.size[0],
        "height": plan.size and plan.size[1],
    }
    given = {name: value for name, value in asked.items() if value is not None}
    still = {"num_frames": 1} if output == "frames" else {}
    # On the CPU, so that a seed gives the same noise on every device.
    generator = torch.Generator("cpu").manual_seed(seed)
    found = pipe(prompt=prompt, generator=generator, output_type="np", **given, **still)
    pixels = found.frames[0] if still else found.images
    if not np.isfinite(pixels).all():
        raise PipelineError(
            f"what is drawn of {prompt!r} with seed {seed} is not finite",
            fix="choose weights and guidance of an ordinary size, or give --dtype float32",
        )
    image = pipe.numpy_to_pil(pixels)[0]
    taken = inspect.signature(type(pipe).__call__).parameters
    defaults = {name: argument.default for name, argument in taken.items()}
    settings = {
        "prompt": prompt,
        "negative": plan.negative,
        "avoid": plan.avoid,
        "steps": given.get("num_inference_steps", defaults["num_inference_steps"]),
        "seed": seed,
        "width": image.width,
        "height": image.height,
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    return image, settings


def save(folder: Path, number: int, image: Any, settings: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = json.dumps(settings, indent=2) + "\n"
    # The settings first, as a process may be killed in between: no picture without its settings.
    files = {f"{number:04}.json": text.encode(), f"{number:04}.png": buffer.getvalue()}
    made: list[Path] = []
    try:
        for name, data in files.items():
            path = folder / name
            with storing(path):
                put_file(path, data, new=True)  # never over what is there
            made.append(path)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def next_number(folder: Path) -> int:
    with storing(folder):
        found = [_NUMBERED.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0) + 1
