"""Reading of reference images: from what a user gives to groups of checked RGB images.

A *group* is the images that one prompt refers to, in order. Paths, PIL images, numpy arrays
(channels last) and torch tensors (channels first) are accepted, one or many, and folders. Every
image becomes an upright 8-bit sRGB image: grayscale in three channels, transparency on white, and
of an animated file the first frame. No image is resized here.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.decode_image import check_size, decode_image, is_animated, to_rgb
from customize.errors import ConfigError, CustomizeError, DataError
from customize.image_folder import image_formats, join_names, scan_folder, warn_ignored
from customize.references.group import SUFFIX
from customize.text import plural, quote
from customize.user_warnings import warn_user

#: The largest number of images in a group.
MAX_REFERENCES = 64
#: The largest number of characters of an attribute.
MAX_ATTRIBUTE_LENGTH = 100

ARGUMENT = "reference_images"
_URL = re.compile(r"\s*(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_FORMS = (
    "give paths, PIL images, arrays or tensors: one, a list for all prompts, or a list of lists "
    "with one for each prompt; or a folder"
)


@dataclass(frozen=True, eq=False)
class Reference:
    """One image that a prompt refers to.

    Attributes:
        image: Upright image of mode RGB, in the size that was given.
        attribute: What to take from it, such as "colour"; empty for everything.
        name: The file or the position in the argument, for messages.
    """

    image: Image.Image
    attribute: str
    name: str

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the size, the attribute and the pixels."""
        sha = hashlib.sha256(repr((self.image.size, self.attribute)).encode())
        sha.update(self.image.tobytes())
        return sha.hexdigest()


#: The images that a prompt refers to, in order.
Group = tuple[Reference, ...]


def read_groups(value: Any, num_prompts: int, where: str = ARGUMENT) -> list[Group]:
    """Read the value of ``reference_images=``.

    Args:
        value: An image, a folder, or a list of images: one group for all prompts. A list of such
            lists or of folders: one group for each prompt. An image is a path, a PIL image, an
            array (height, width[, channels]) or a tensor ([channels,] height, width), or a tuple of
            one of these and the attribute to take from it. An array or tensor with one more
            dimension is a list. Floating-point values are in [0, 1].
        num_prompts: Number of prompts of the call.
        where: Name of the argument in messages.

    Returns:
        One group, which is for all prompts, or one for each.

    Raises:
        ConfigError: The value has another form, the number of groups is not that of the prompts, a
            group is empty or has more than 64 images, or an image has values out of range.
        DataError: A file cannot be read, or an image is smaller than 16 pixels on a side.
    """
    items = _unstack(value)
    if not isinstance(items, list) or not items or not any(_is_group(item) for item in items):
        return [read_group(value, where)]
    if not all(_is_group(item) for item in items):
        raise ConfigError("the list mixes images with lists or folders", where=where, fix=_FORMS)
    if len(items) not in (1, num_prompts):
        prompts = plural(num_prompts, "prompt")
        raise ConfigError(
            f"{len(items)} groups of reference images were given for {prompts}",
            where=where,
            fix="give one group for all prompts, or one for each prompt",
        )
    return [read_group(item, f"{where}[{index}]") for index, item in enumerate(items)]


def read_group(value: Any, where: str = ARGUMENT) -> Group:
    """Read one group: an image, a list of images, or a folder of images sorted by name.

    The arguments and errors are those of :func:`read_groups`.
    """
    items = _unstack(value)
    if not isinstance(items, list):
        items = _list_folder(items) if _is_folder(items) else [items]
    _check_count(len(items), where)
    is_single = not isinstance(_unstack(value), list) and not _is_folder(value)
    animated: list[str] = []
    group = tuple(
        _read_image(item, where if is_single else f"{where}[{index}]", animated)
        for index, item in enumerate(items)
    )
    if animated:
        number = plural(len(animated), "animated reference image")
        warn_user(f"one frame is used of {number}: {join_names(animated)}")
    _warn_about_repeated(group)
    return group


def _is_group(item: Any) -> bool:
    return isinstance(_unstack(item), list) or _is_folder(item)


def _is_folder(item: Any) -> bool:
    if not isinstance(item, str | os.PathLike):
        return False
    try:
        return os.path.isdir(item)
    except ValueError:  # a zero byte
        return False


def _list_folder(folder: Any) -> list[Path]:
    scanned = scan_folder(Path(folder))
    warn_ignored(scanned.path, scanned.ignored)
    return scanned.images


def _unstack(value: Any) -> Any:
    """Convert tuples without an attribute, and arrays with a batch dimension, to lists."""
    if isinstance(value, np.ndarray | Tensor):
        is_stack = value.ndim > 3 and not (isinstance(value, Tensor) and value.is_nested)
        return list(value) if is_stack else value
    if isinstance(value, tuple) and not _has_attribute(value):
        return list(value)
    return value


def _has_attribute(value: Any) -> bool:
    """Whether a value is a tuple of an image and an attribute."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str)


def _check_count(count: int, where: str) -> None:
    if not count:
        raise ConfigError(
            "there are no reference images", where=where, fix="leave the argument out, or give some"
        )
    if count > MAX_REFERENCES:
        raise ConfigError(
            f"{count:,} reference images exceed the limit of {MAX_REFERENCES} in a group",
            where=where,
            fix="choose the images that show best what they share",
        )


def _read_image(item: Any, where: str, animated: list[str]) -> Reference:
    """Read one image.

    Args:
        item: The image, perhaps with an attribute.
        where: Its position, for messages.
        animated: Receives the name and the frame of an animated image.
    """
    attribute = ""
    if _has_attribute(item):
        item, attribute = item
        attribute = _check_attribute(attribute, where)
    if isinstance(item, str | os.PathLike):
        return Reference(_read_file(item, where, animated), attribute, os.fsdecode(item))
    try:
        if isinstance(item, Image.Image):
            image = _from_pil(item, where, animated)
        elif isinstance(item, np.ndarray):
            image = _from_array(item, where)
        elif isinstance(item, Tensor):
            image = _from_tensor(item, where)
        else:
            raise ConfigError(
                f"a reference image cannot be a {type(item).__name__}", where=where, fix=_FORMS
            )
    except CustomizeError:
        raise
    except Exception as error:  # PIL's decoders raise any exception on damaged data
        raise DataError(
            f"the image cannot be read: {error}", where=where, fix="save it again as a PNG"
        ) from error
    return Reference(image, attribute, where)


def _check_attribute(attribute: str, where: str) -> str:
    words = " ".join(attribute.split())
    suffix = os.path.splitext(words)[1].lower()
    if suffix in image_formats()[0] or _URL.match(words):
        raise ConfigError(
            f"a tuple is an image and the attribute to take from it, and {quote(words)} is a file",
            where=where,
            fix="write the images as a list, in square brackets",
        )
    if not 0 < len(words) <= MAX_ATTRIBUTE_LENGTH:
        raise ConfigError(
            f"an attribute has 1 to {MAX_ATTRIBUTE_LENGTH} characters, not {len(words):,}",
            where=where,
            fix='give such as (image, "colour")',
        )
    if not is_attribute(words):
        raise ConfigError(
            f"an attribute is plain words, without special tokens, not {quote(words)}",
            where=where,
            fix='give such as (image, "colour")',
        )
    return words


def is_attribute(words: str) -> bool:
    """Whether words can name an attribute in the text that a reference model reads.

    Special tokens of its chat format, such as ``<|image_pad|>``, would stand for the image itself.
    """
    return 0 < len(words) <= MAX_ATTRIBUTE_LENGTH and words.isprintable() and "<|" not in words


def _read_file(path: str | os.PathLike[Any], where: str, animated: list[str]) -> Image.Image:
    text = os.fsdecode(path)
    if _URL.match(text):
        raise ConfigError(
            f"{quote(text)} is a URL, and nothing is downloaded",
            where=where,
            fix="download the image first, and give its path",
        )
    if not text.strip():
        raise ConfigError("the path is empty", where=where, fix=_FORMS)
    if _is_folder(path):
        raise ConfigError(
            f"{quote(text)} is a folder, and a single image is expected",
            where=where,
            fix="give the folder alone, or its images: (image, attribute) takes no folder, and a "
            "list of images holds none",
        )
    if text.lower().endswith(".safetensors"):
        is_group = text.lower().endswith(SUFFIX)
        raise ConfigError(
            f"{quote(text)} is {'an encoded group' if is_group else 'weights'}, and an image is "
            "expected",
            where=where,
            fix=f"give the group as {ARGUMENT}= itself, not among images" if is_group else _FORMS,
        )
    return decode_image(
        Path(text), "RGB", on_animation=lambda path: animated.append(f"{path} (frame 1)")
    )


def _from_pil(image: Image.Image, where: str, animated: list[str]) -> Image.Image:
    _check_pixels(image.size, where)
    if is_animated(image):
        animated.append(f"{where} (frame {image.tell() + 1}, its current one)")
    return to_rgb(image)


def _from_tensor(tensor: Tensor, where: str) -> Image.Image:
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        raise ConfigError("a reference image cannot be nested, quantized or sparse", where=where)
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # numpy has no bfloat16
    return _from_array((tensor.movedim(0, -1) if tensor.ndim == 3 else tensor).numpy(), where)


def _from_array(array: np.ndarray[Any, Any], where: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ConfigError(
            f"an array of shape {array.shape} is not an image",
            where=where,
            fix="give (height, width, channels) as an array, or (channels, height, width) as a "
            "tensor, with 1, 3 or 4 channels",
        )
    _check_pixels((array.shape[1], array.shape[0]), where)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError("the image is not finite", where=where)
        if low < 0.0 or high > 1.0:
            raise ConfigError(
                f"the image has values from {low:g} to {high:g}",
                where=where,
                fix="scale them to 0 (black) to 1 (white), or give 8-bit integers",
            )
        array = (array.astype(np.float32) * 255.0).round().astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ConfigError(
            f"the image has values of type {array.dtype}",
            where=where,
            fix="give 8-bit integers, or floating-point values from 0 to 1",
        )
    if array.ndim == 3 and channels == 1:
        array = array[:, :, 0]
    return to_rgb(Image.fromarray(np.ascontiguousarray(array)))


def _check_pixels(size: tuple[int, int], where: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(size) > limit:
        raise DataError(
            f"the image has more than {limit} pixels",
            where=where,
            fix="shrink it; models use far fewer pixels",
        )
    check_size(size, where)


def _warn_about_repeated(group: Sequence[Reference]) -> None:
    names: dict[str, str] = {}
    repeated = []
    for reference in group:
        if reference.digest in names:
            repeated.append(f"{reference.name} (the same as {names[reference.digest]})")
        names.setdefault(reference.digest, reference.name)
    if repeated:
        number = plural(len(repeated), "repeated reference image")
        warn_user(f"the model reads {number} again: {join_names(repeated)}")


def count_prompts(call: Mapping[str, Any]) -> int:
    """Return the number of prompts in the arguments of a call; 1 if it is unknown."""
    for name in ("prompt", "prompt_embeds"):
        prompts = call.get(name)
        if isinstance(prompts, list | tuple | Tensor) and len(prompts):
            return len(prompts)
        if prompts is not None:
            return 1
    return 1
