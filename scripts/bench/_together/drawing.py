"""Drawing by a pipeline as it is, and by the arguments of a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _together.cast import Scene, Size, class_of, prompt_of, story
from customize.evaluation.storybook_rates import GUIDANCE, STEPS

Box = tuple[float, float, float, float]


def draw(
    pipe: Any,
    things: Sequence[str],
    prompts: Sequence[str],
    numbers: Sequence[int],
    size: Size,
    **call: Any,
) -> Tensor:
    """Draw by plain prompts without ``together=``, or with further arguments of the call.

    Args:
        pipe: The pipeline, with concepts attached.
        things: The words for each thing, from left to right.
        prompts: One for each image.
        numbers: The seed of each image.
        size: (height, width) in pixels.
        **call: Further arguments.

    Returns:
        (batch, 3, *size), float32 in [-1, 1].
    """
    images = pipe(
        list(prompts),
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(number) for number in numbers],
        output_type="pt",
        **{"together": False} | call,
    ).images
    return images.float() * 2 - 1


def boxes(things: Sequence[str]) -> dict[str, Box]:
    """An equal part of the image's width for each thing."""
    count = len(things)
    return {thing: (i / count, 0.0, (i + 1) / count, 1.0) for i, thing in enumerate(things)}


def draw_words(pipe: Any, things: Sequence[str], *scene: Any) -> Tensor:
    """Ours, from the words alone."""
    return draw(pipe, things, *scene, together=True)


def draw_boxes(pipe: Any, things: Sequence[str], *scene: Any) -> Tensor:
    """Ours, with the concepts' boxes given."""
    areas = {thing: box for thing, box in boxes(things).items() if thing.startswith("<")}
    return draw(pipe, things, *scene, together=areas)


def draw_regions(pipe: Any, things: Sequence[str], *scene: Any) -> Tensor:
    """Ours, by MultiDiffusion in boxes."""
    return draw(pipe, things, *scene, regions=boxes(things))


# --- ceilings: one concept at a time ----------------------------------------------------------


def beside_classes(pipe: Any, folders: Mapping[str, Path], scene: Scene) -> list[Tensor]:
    """For each thing the images with its concept alone, beside plain things of the others' classes.

    Args:
        pipe: The pipeline, without concepts.
        folders: Name -> the concept's folder.
        scene: The scene.
    """
    views = []
    for position, name in enumerate(scene.names):
        things = tuple(
            story(other).trigger if i == position else f"a {class_of(other)}"
            for i, other in enumerate(scene.names)
        )
        views.append(_draw_alone(pipe, folders[name], scene, things))
    return views


def in_boxes(pipe: Any, folders: Mapping[str, Path], scene: Scene) -> list[Tensor]:
    """For each thing the images with its concept alone, in its box by ``regions=``."""
    views = []
    for name, (thing, box) in zip(scene.names, boxes(scene.things).items(), strict=True):
        views.append(_draw_alone(pipe, folders[name], scene, (thing,), regions={thing: box}))
    return views


def no_concepts(pipe: Any, folders: Mapping[str, Path], scene: Scene) -> list[Tensor]:
    """The base model's images of the classes."""
    things = tuple(f"a {class_of(name)}" for name in scene.names)
    return [_draw_instead(pipe, scene, things)] * len(things)


def _draw_alone(
    pipe: Any, folder: Path, scene: Scene, things: tuple[str, ...], **call: Any
) -> Tensor:
    pipe.load_custom(folder)
    try:
        return _draw_instead(pipe, scene, things, **call)
    finally:
        pipe.unload_custom()


def _draw_instead(pipe: Any, scene: Scene, things: tuple[str, ...], **call: Any) -> Tensor:
    prompts = [prompt_of(things, place) for place in scene.places]
    return draw(pipe, things, prompts, scene.numbers, scene.size, **call)
