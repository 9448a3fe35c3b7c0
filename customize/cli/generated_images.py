"""Generate one image of ``customize generate``, and save it with its settings."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from customize.atomic import write_atomic
from customize.cli.generation_plan import GenerationPlan
from customize.cli.output_files import storage_errors
from customize.errors import PipelineError, StorageError

# Images, settings and masks, such as 0001.png, 0001.json and 0001.rex.png.
_NUMBERED = re.compile(r"(\d{4,})(\.[\w-]+)?\.(png|json)")


def generate_image(
    pipe: Any,
    prompt: str,
    seed: int,
    plan: GenerationPlan,
    arguments: Mapping[str, Any],
    output: str,
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Generate one image.

    Args:
        pipe: Diffusers pipeline.
        prompt: A prompt of the plan.
        seed: Seed of the noise, which is drawn on the CPU so that it is the same on every device.
        plan: Sampling settings.
        arguments: Further arguments of the call, such as the guidance scale.
        output: Attribute of the pipeline's output, "images" or "frames"; videos have one frame.

    Returns:
        The PIL image; concept name -> PIL image of where it acted, if the call returns masks; and
        the settings that the image depends on.

    Raises:
        PipelineError: The image is not finite, and would be stored as black.
    """
    import numpy as np
    import torch

    requested = {
        "num_inference_steps": plan.steps,
        **arguments,
        "width": plan.size and plan.size[0],
        "height": plan.size and plan.size[1],
    }
    call = {name: value for name, value in requested.items() if value is not None}
    single_frame = {"num_frames": 1} if output == "frames" else {}
    generator = torch.Generator("cpu").manual_seed(seed)
    result = pipe(prompt=prompt, generator=generator, output_type="np", **call, **single_frame)
    pixels = result.frames[0] if single_frame else result.images
    if not np.isfinite(pixels).all():
        raise PipelineError(
            f"the image of {prompt!r} with seed {seed} is not finite",
            fix="choose usual weights and guidance scales, or give --dtype float32",
        )
    image = pipe.numpy_to_pil(pixels)[0]
    steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    settings = {
        "prompt": prompt,
        "rewritten": next(iter(getattr(result, "prompts", [])), None),
        "negative": plan.negative,
        "avoid": plan.avoid,
        "steps": call.get("num_inference_steps", steps),
        "seed": seed,
        "width": image.width,
        "height": image.height,
        "together": pipe.custom.reports.get("together"),
        "reference_agreement": _reference_agreement(result),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }
    masks: Mapping[str, Any] = next(iter(getattr(result, "masks", [])), {})
    return image, {n: m[0] if isinstance(m, list) else m for n, m in masks.items()}, settings


def save_masks(folder: Path, number: int, masks: Mapping[str, Any]) -> None:
    """Save where concepts acted in an image, beside it.

    Args:
        folder: An existing folder.
        number: Of the image.
        masks: Concept name -> PIL image.

    Raises:
        StorageError: A file exists already or cannot be written.
    """
    for name, mask in masks.items():
        buffer = io.BytesIO()
        mask.save(buffer, "PNG")
        safe = re.sub(r"[^\w-]", "_", name)
        path = folder / f"{number:04}.{safe}.png"
        with storage_errors(path):
            write_atomic(path, buffer.getvalue(), new=True)


def _reference_agreement(result: Any) -> list[float] | None:
    """How well each reference image agrees with the others; None if it was not measured."""
    groups = getattr(result, "references", None)
    if not groups:
        return None
    by_words = groups[0] if isinstance(groups[0], Mapping) else {None: groups[0]}
    return [round(value, 4) for group in by_words.values() for value in group.agreement]


def save_image(folder: Path, number: int, image: Any, settings: Mapping[str, Any]) -> int:
    """Save an image and its settings under a number, without overwriting files.

    Args:
        folder: An existing folder.
        number: Preferred number; the next free one if another process has used it meanwhile.
        image: PIL image.
        settings: Content of the JSON file.

    Returns:
        The number of the files.

    Raises:
        StorageError: The files cannot be written.
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


def _write_pair(stem: Path, settings: bytes, image: bytes) -> None:
    """Write both files, or none after an error."""
    # The settings first: a process killed in between leaves no image without settings.
    settings_file = stem.with_suffix(".json")
    write_atomic(settings_file, settings, new=True)
    try:
        write_atomic(stem.with_suffix(".png"), image, new=True)
    except BaseException:
        settings_file.unlink(missing_ok=True)
        raise


def next_free_number(folder: Path) -> int:
    """One more than the highest number of an image, settings file or mask in a folder."""
    with storage_errors(folder):
        matches = [_NUMBERED.fullmatch(path.name) for path in folder.iterdir()]
    return max((int(match[1]) for match in matches if match), default=0) + 1


def describe_numbers(numbers: list[int]) -> str:
    """The file names of saved images: "0001.png to 0004.png"."""
    first, last = f"{numbers[0]:04}.png", f"{numbers[-1]:04}.png"
    if len(numbers) == 1:
        return first
    # Numbers in between may belong to another process that generates into the same folder.
    prefix = "" if numbers[-1] - numbers[0] < len(numbers) else f"{len(numbers)} of "
    return f"{prefix}{first} to {last}"


def describe_attached(pipe: Any, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return the attached concepts of an image, named ones and a library's, for its settings."""
    from customize.pipeline.state import get_state

    state = get_state(pipe)
    attached = state.attached.values() if state is not None else ()
    weights = {row.name: row.weight for row in pipe.custom.rows}
    stored = {n: w if isinstance(w, float) else f"{w}" for n, w in weights.items()}
    return {
        "merge": pipe.custom.merge if len(attached) > 1 else None,
        "concepts": [
            {
                "name": entry.name,
                "trigger": entry.concept.info.trigger,
                "class_word": entry.concept.info.class_word,
                "subjects": {s.trigger: s.class_word for s in entry.concept.subjects},
                "weight": stored[entry.name],
                "source": sources.get(entry.name) or str(entry.concept.source),
            }
            for entry in attached
        ],
    }


def describe_region(region: Any) -> Any:
    """Return the numbers of a box, or the size of a mask."""
    return list(region) if isinstance(region, tuple) else f"mask of {region.width}x{region.height}"
