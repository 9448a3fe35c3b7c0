"""Models that read reference images by themselves: which argument takes them, and in which form.

The declarations are those of the model families, and :data:`OTHERS` for models that belong to no
family. What a model cannot do is refused; what it does to the images' sizes is a warning.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from customize.core.scalars import as_float
from customize.decode_image import format_size
from customize.errors import ConfigError
from customize.families import FAMILIES
from customize.families.native_references import NativeReferences
from customize.references.images import ARGUMENT, Group, count_prompts, read_groups
from customize.references.scale import SCALE_ARGUMENT
from customize.text import plural
from customize.user_warnings import warn_user

#: The declarations of models that belong to no family.
OTHERS: tuple[NativeReferences, ...] = (
    NativeReferences(
        model="OmniGen",
        pipelines=("OmniGenPipeline",),
        argument="input_images",
        form="nested",
        prompts="own",
        order="number of its placeholder in the prompt",
        size_rule="shrunk to a longer side of max_input_image_size (default 1024) if larger; up to "
        "15 pixels of a side are cut off",
        placeholder="<img><|image_{}|></img>",
    ),
    NativeReferences(
        model="JoyImage-Edit-Plus",
        pipelines=("JoyImageEditPlusPipeline",),
        argument="images",
        form="nested",
        prompts="own",
        output_size="last",
        order="order before the prompt",
        size_rule="resized to the nearest of its trained sizes, about 1 megapixel, and the rest "
        "cut off at the longer sides",
        max_pixels=1024**2,
    ),
    NativeReferences(
        model="GLM-Image",
        pipelines=("GlmImagePipeline",),
        form="nested",
        prompts="own",
        output_size="first",
        order="order before the prompt",
        size_rule="stretched to sides of multiples of 16",
        equal_counts=True,
        cache="yes",
    ),
    NativeReferences(
        model="FIBO 2",
        pipelines=("BriaFibo2Pipeline",),
        limit=5,
        output_size="first",
        order="`<image_1>`, `<image_2>`, ... of the prompt",
        size_rule="resized to the nearest of its trained sizes",
    ),
    NativeReferences(
        model="MiniMax-H3",
        pipelines=(),
        argument="references",
        blocks=("minimax-h3",),
        form="typed",
        limit=9,
        prompts="one prompt",
        order="`<Picture 1>`, `<Picture 2>`, ... of the prompt",
        size_rule="resized to a short side of 2048, also enlarged",
    ),
)


@functools.cache
def all_native_references() -> tuple[NativeReferences, ...]:
    """Return the declarations of all models, in the order of the guide's table."""
    families = [native for family in FAMILIES.values() for native in family.native_references]
    return (*families, *OTHERS)


def find_native_references(pipe: Any, parameters: Mapping[str, Any]) -> NativeReferences | None:
    """Return how a pipeline takes reference images by itself; None if it does not.

    Args:
        pipe: A standard or modular pipeline.
        parameters: Names of the call's parameters.
    """
    for native in all_native_references():
        if native.matches(pipe, parameters):
            return native
    return None


def with_prompt_first(native: NativeReferences, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call in which a text that was given in place of the images is the prompt.

    Most of these pipelines have the images as their first parameter, and the others the prompt.
    ``pipe("a dog", reference_images=...)`` means the same on all of them.
    """
    text = call.get(native.argument)
    texts = text if isinstance(text, list | tuple) else [text]
    if call.get("prompt") is not None or not texts or not all(isinstance(t, str) for t in texts):
        return dict(call)
    return {name: value for name, value in call.items() if name != native.argument} | {
        "prompt": text
    }


def native_arguments(
    native: NativeReferences,
    call: Mapping[str, Any],
    reference_images: Any,
    reference_scale: Any = None,
) -> dict[str, Any]:
    """Convert ``reference_images=`` to the arguments of a pipeline that takes them by itself.

    Args:
        native: How the pipeline takes them.
        call: The other arguments of the call.
        reference_images: Images, see :func:`customize.references.images.read_groups`.
        reference_scale: Weight of the references, or one for each; 1 unless the pipeline has
            arguments for it.

    Returns:
        The arguments to add to the call.

    Raises:
        ConfigError: The model has no such thing as is asked for, or the call also has the argument
            that the references are converted to.
        DataError: A file cannot be read.
    """
    given = [
        name for name in (native.argument, *native.scale_arguments) if call.get(name) is not None
    ]
    if native.argument in given:
        raise ConfigError(
            f"{native.model} takes {ARGUMENT}= as {native.argument}=, and the call has both",
            where=ARGUMENT,
            fix=f"leave out {native.argument}=, and give all images as {ARGUMENT}=",
        )
    if isinstance(reference_images, Mapping):
        raise ConfigError(
            f"{native.model} takes no references for single words of the prompt",
            where=ARGUMENT,
            fix=f"give a list, and say in the prompt which is which: {_naming(native)}",
        )
    if isinstance(reference_images, str | os.PathLike) and os.fsdecode(
        reference_images
    ).lower().endswith(".safetensors"):
        raise ConfigError(
            f"{native.model} reads images, and no file of encoded references",
            where=reference_images,
            fix="give the images that it was made from",
        )
    num_prompts = count_prompts(call)
    if native.prompts == "one prompt" and num_prompts > 1:
        raise ConfigError(
            f"{native.model} draws one prompt a call with references, not {num_prompts}",
            where="prompt",
            fix="call it once for each prompt",
        )
    groups = read_groups(reference_images, num_prompts)
    if len(groups) > 1 and native.prompts != "own":
        raise ConfigError(
            f"{native.model} shows all prompts of a call the same references, and {len(groups)} "
            "groups were given",
            where=ARGUMENT,
            fix="call it once for each prompt",
        )
    for group in groups:
        _check_group(native, group)
    if native.equal_counts and len({len(group) for group in groups}) > 1:
        raise ConfigError(
            f"{native.model} needs the same number of references for each prompt of a call, not "
            f"{', '.join(str(len(group)) for group in groups)}",
            where=ARGUMENT,
            fix="call it once for each prompt",
        )
    groups = (
        groups if len(groups) == num_prompts or native.prompts != "own" else groups * num_prompts
    )
    _check_placeholders(native, call.get("prompt"), groups)
    _warn_about_shrinking(native, groups)
    weights = _weights(native, reference_scale, len(groups[0]))
    if weights is not None and len(given) > 0:
        raise ConfigError(
            f"the call has {' and '.join(given)} and {SCALE_ARGUMENT}=",
            where=SCALE_ARGUMENT,
            fix="leave one of them out",
        )
    arguments: dict[str, Any] = {native.argument: _value(native, groups)}
    if weights is not None:
        arguments |= {name: list(weights) for name in native.scale_arguments}
    return arguments


def _check_group(native: NativeReferences, group: Group) -> None:
    if native.limit is not None and len(group) > native.limit:
        limit = plural(native.limit, "reference image")
        reason = ""
        if native.form == "image":
            reason = "; a list would be several edits, one for each image"
        raise ConfigError(
            f"{native.model} reads {limit} at most, and {len(group)} were given{reason}",
            where=ARGUMENT,
            fix=f"give {native.limit}",
        )
    for number, reference in enumerate(group, 1):
        width, height = reference.image.size
        size = format_size(reference.image.size)
        if reference.attribute:
            raise ConfigError(
                f"{native.model} takes no attribute of a reference, such as "
                f'"{reference.attribute}"',
                where=reference.name,
                fix=f"give the image alone, and say in the prompt what to take from it: "
                f"{_naming(native)}",
            )
        if min(width, height) < native.min_side:
            raise ConfigError(
                f"reference {number} is {size} pixels, and {native.model} needs {native.min_side} "
                "on each side",
                where=reference.name,
                fix="enlarge it, or give a larger image",
            )
        if native.max_aspect is not None and max(width, height) > native.max_aspect * min(
            width, height
        ):
            raise ConfigError(
                f"reference {number} is {size} pixels, and {native.model} takes sides of at most "
                f"{native.max_aspect:g}:1",
                where=reference.name,
                fix="crop it",
            )


def _check_placeholders(native: NativeReferences, prompt: Any, groups: Sequence[Group]) -> None:
    if not native.placeholder:
        return
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple):
        return  # the pipeline says what it needs
    for text, group in zip(prompts, groups, strict=True):
        missing = [
            mark
            for number in range(1, len(group) + 1)
            if (mark := native.placeholder.format(number)) not in str(text)
        ]
        if missing:
            raise ConfigError(
                f"{native.model} needs a placeholder in the prompt for each reference, and "
                f"{', '.join(missing)} is missing",
                where="prompt",
                fix=f'write such as "the dog of {missing[0]} on a beach"',
            )


def _warn_about_shrinking(native: NativeReferences, groups: Sequence[Group]) -> None:
    shrunk: dict[str, str] = {}
    for group in groups:
        limit = native.max_pixels
        if len(group) == 1 and native.max_pixels_alone is not None:
            limit = native.max_pixels_alone
        for reference in group:
            if limit is not None and math.prod(reference.image.size) > limit:
                shrunk[reference.name] = format_size(reference.image.size)
    if shrunk:
        names = ", ".join(f"{name} ({size})" for name, size in list(shrunk.items())[:5])
        more = f" and {len(shrunk) - 5} more" if len(shrunk) > 5 else ""
        warn_user(f"{native.model} shrinks {names}{more}: {native.size_rule}")


def _weights(native: NativeReferences, scale: Any, count: int) -> list[float] | None:
    """Return a weight for each reference; None for the pipeline's default."""
    if scale is None:
        return None
    items = list(scale) if isinstance(scale, list | tuple) else [scale] * count
    weights = [as_float(item) for item in items]
    if len(weights) != count or not all(
        math.isfinite(weight) and weight >= 0 for weight in weights
    ):
        raise ConfigError(
            f"{SCALE_ARGUMENT} is not a number from 0, or one for each of {count} references",
            where=SCALE_ARGUMENT,
            fix="give such as 1.0",
        )
    if native.scale_arguments:
        return weights
    if any(weight != 1.0 for weight in weights):
        raise ConfigError(
            f"{native.model} has no scale of its references",
            where=SCALE_ARGUMENT,
            fix=f"leave it out, or at 1; without {ARGUMENT}= it draws without references",
        )
    return None


def _value(native: NativeReferences, groups: Sequence[Group]) -> Any:
    """Return the value of the pipeline's argument."""
    images: list[list[Image.Image]] = [[item.image for item in group] for group in groups]
    if native.form == "nested":
        return images
    if native.form == "image":
        return images[0][0]
    if native.form == "typed":
        from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference

        return [MiniMaxH3ImageReference(image) for image in images[0]]
    return images[0]


def _naming(native: NativeReferences) -> str:
    return f"for this model the order means {native.order}"
