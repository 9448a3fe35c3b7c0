"""Drawing one picture of ``customize generate``, and writing it with its settings."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.atomic import write_atomic
from customize.cli.command_support import storage_errors
from customize.errors import PipelineError, StorageError

if TYPE_CHECKING:
    from customize.cli.generate_command import GenerationPlan

_NUMBERED = re.compile(r"(\d{4,})\.(png|json)")


def generate_image(
    pipe: Any,
    prompt: str,
    seed: int,
    plan: GenerationPlan,
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


def save_image(folder: Path, number: int, image: Any, settings: Mapping[str, Any]) -> int:
    """Write a picture and its settings, never over a file that is there.

    Args:
        number: of the files; the next one free where another process has taken it meanwhile.

    Returns:
        The number of the files.

    Raises:
        StorageError: they cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    text = json.dumps(settings, indent=2) + "\n"
    while True:
        try:
            with storage_errors(folder / f"{number:04}.png"):
                _write_pair(folder / f"{number:04}", text.encode(), buffer.getvalue())
        except StorageError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
            number = max(number + 1, next_free_number(folder))
        else:
            return number


def _write_pair(stem: Path, settings: bytes, picture: bytes) -> None:
    """Both files or, after an error, none of them."""
    # The settings first, as a process may be killed in between: no picture without its settings.
    first = stem.with_suffix(".json")
    write_atomic(first, settings, new=True)
    try:
        write_atomic(stem.with_suffix(".png"), picture, new=True)
    except BaseException:
        first.unlink(missing_ok=True)
        raise


def next_free_number(folder: Path) -> int:
    with storage_errors(folder):
        found = [_NUMBERED.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in found if match), default=0) + 1
