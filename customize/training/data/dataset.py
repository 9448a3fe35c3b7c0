"""Training images with captions and masks, validated before a model is loaded.

Images are the JPEG, PNG and WebP files of a folder without its subfolders, and HEIC and AVIF files
if supported; see :mod:`customize.image_folder`. They are converted to upright 8-bit
sRGB. An unreadable image raises an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from customize.decode_image import decode_image, format_size
from customize.errors import DataError
from customize.image_folder import (
    count_images,
    has_exact_name,
    join_names,
    match_by_name,
    scan_folder,
    warn_ignored,
)
from customize.image_tensors import images_to_tensor
from customize.training.data.captions import read_captions

_HASHED_ROWS = 256  # at a time

#: (width, height) in pixels, as in PIL.
Size = tuple[int, int]


class ImageAndMask(NamedTuple):
    """An image and its mask.

    Attributes:
        image: Mode RGB, 8-bit sRGB.
        mask: Mode L, of the same size, 255 for trained pixels; None: all pixels are trained.
    """

    image: Image.Image
    mask: Image.Image | None


@dataclass(frozen=True)
class TrainingImage:
    """One training image.

    Attributes:
        path: The image file.
        size: (width, height) of the upright image in pixels, at least 16 x 16.
        caption: One line of text.
        loaded: The image and its mask, possibly cropped and resized; None: not in memory, so that
            :func:`load_image_and_mask` reads them again.
        mask_path: The mask file, or None.
        templated: Whether the caption is from the template.
        digest: :func:`content_hash` before resizing.
    """

    path: Path
    size: Size
    caption: str
    loaded: ImageAndMask | None
    mask_path: Path | None = None
    templated: bool = False
    digest: str = ""

    @property
    def image(self) -> Image.Image:
        """The image; read from its file if it is not in memory."""
        return load_image_and_mask(self).image

    @property
    def mask(self) -> Image.Image | None:
        """The mask; read from its file if it is not in memory."""
        return load_image_and_mask(self).mask


def read_training_images(
    folder: Path | str,
    *,
    trigger: str | None,
    caption: str | None = None,
    masks: Path | str | None = None,
    resolution: int | None = None,
    keep_in_memory: bool = True,
    square: bool = True,
    limit: int | None = None,
    forbidden: Sequence[str] = (),
) -> list[TrainingImage]:
    """Read the images of a folder in the order of their names, with captions and masks.

    The caption of an image is the text of the .txt or .caption file with its name, otherwise its
    row in metadata.jsonl (``{"file_name": ..., "text": ...}``) or metadata.csv (columns
    ``file_name`` and ``text``), otherwise the template. Subfolders, other files and unmatched
    captions are ignored with a warning.

    Args:
        folder: The folder.
        trigger: Word that every caption must contain and that fills the template; None for class
            images, whose captions are arbitrary.
        caption: Caption template, with {} for the trigger; None: every image needs a caption.
        masks: Folder with a mask for each image, of the same stem and size; only white is
            trained.
        resolution: Crop and resize images in memory to this side in pixels, to save memory.
        keep_in_memory: Keep the images in memory; otherwise :func:`load_image_and_mask` reads
            them again.
        square: Whether only the centre square is trained, where masks must not be black.
        limit: Maximum number of images.
        forbidden: Words that captions must not contain, such as the triggers in captions of class
            images.

    Raises:
        DataError: The folder has no images or is unreadable; an image is corrupt, animated, smaller
            than 16 pixels on a side or too large to decode safely; a caption is missing,
            unreadable, lacks the trigger or contains a forbidden word; a mask is missing, black in
            the trained area or of another size.
    """
    files = scan_folder(Path(folder))
    paths = files.images[:limit]
    captions = read_captions(files, paths, template=caption, trigger=trigger, forbidden=forbidden)
    # customize generate writes a .json file beside each image, which evaluation reads.
    ignored = [name for name in files.ignored if trigger or not name.endswith(".json")]
    warn_ignored(files.path, [*captions.unused, *ignored])
    mask_paths = {} if masks is None else _match_masks(Path(masks), paths, files.images)
    samples = []
    for path in paths:
        image = read_image(path)
        mask_path = mask_paths.get(path)
        mask = None if mask_path is None else read_mask(mask_path, image.size, square)
        full = ImageAndMask(image, mask)
        text = captions.texts[path]
        sample = TrainingImage(
            path,
            image.size,
            text,
            full if keep_in_memory and resolution is None else None,
            mask_path,
            path in captions.templated,
            content_hash(full, text),
        )
        if keep_in_memory and resolution is not None:
            sample = replace(sample, loaded=_resize(full, resolution))
        samples.append(sample)
    return samples


def load_image_and_mask(sample: TrainingImage) -> ImageAndMask:
    """Return an image and its mask, reading their files if they are not in memory.

    Raises:
        DataError: A file is unreadable, or has changed since the first reading.
    """
    if sample.loaded is not None:
        return sample.loaded
    image = read_image(sample.path)
    mask = None
    if sample.mask_path is not None:
        mask = read_mask(sample.mask_path, image.size, square=False)
    loaded = ImageAndMask(image, mask)
    if content_hash(loaded, sample.caption) != sample.digest:
        raise DataError(
            "the image or its mask changed after the run began",
            where=sample.path,
            fix="run again when no other program writes to the folder",
        )
    return loaded


def read_image(path: Path) -> Image.Image:
    """Read an image file as upright 8-bit sRGB, composited on white.

    Raises:
        DataError: See :func:`customize.decode_image.decode_image`.
    """
    return decode_image(path, "RGB")


def read_mask(path: Path, size: Size, square: bool = True) -> Image.Image:
    """Read a mask file as upright grayscale (mode L), composited on black.

    Args:
        path: The file.
        size: Size of the image after EXIF rotation.
        square: Whether only the centre square is trained.

    Raises:
        DataError: The mask is unreadable, has another size or is black in the trained area.
    """
    mask = decode_image(path, "L")
    if mask.size != size:
        raise DataError(
            f"the mask is {format_size(mask.size)} pixels and its image {format_size(size)}",
            where=path,
            fix="give both the same size",
        )
    trained = (min(size), min(size)) if square else size
    if crop_and_resize(mask, trained, Image.Resampling.BOX).getextrema() == (0, 0):
        raise _black_mask_error("the centre square" if square else "it", path)
    return mask


def image_tensor(sample: TrainingImage | ImageAndMask, size: Size | int) -> Tensor:
    """Crop an image at its centre, resize it by Lanczos and convert it to a tensor.

    Args:
        sample: The image.
        size: (width, height), or the side of a square, in pixels.

    Returns:
        (3, height, width), float32 in [-1, 1].
    """
    image = crop_and_resize(sample.image, _size(size), Image.Resampling.LANCZOS)
    return images_to_tensor([image])[0].contiguous()


def mask_tensor(
    sample: TrainingImage, size: Size | int, loaded: ImageAndMask | None = None
) -> Tensor:
    """Crop a mask as :func:`image_tensor` does, and average it to a size, such as the latents'.

    Args:
        sample: The image.
        size: (width, height), or the side of a square.
        loaded: The image and its mask, if they are in memory.

    Returns:
        (1, height, width), float32 in [0, 1]; ones without a mask.

    Raises:
        DataError: The mask is black in the cropped area.
    """
    width, height = _size(size)
    full_mask = (loaded or load_image_and_mask(sample)).mask
    if full_mask is None:
        return torch.ones(1, height, width)
    mask = crop_and_resize(full_mask, (width, height), Image.Resampling.BOX)
    if mask.getextrema() == (0, 0):
        raise _black_mask_error("the part of the image that is trained", sample.path)
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255.0


def content_hash(loaded: ImageAndMask, caption: str) -> str:
    """Return the SHA-256 of image, mask and caption, in hexadecimal."""
    digest = hashlib.sha256()
    for image in loaded:
        if image is not None:
            digest.update(f"{image.mode} {image.width} {image.height} ".encode())
            for top in range(0, image.height, _HASHED_ROWS):  # without a copy of the full image
                bottom = min(top + _HASHED_ROWS, image.height)
                digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    digest.update(caption.encode())
    return digest.hexdigest()


def _resize(loaded: ImageAndMask, side: int) -> ImageAndMask:
    size, mask = (side, side), loaded.mask
    return ImageAndMask(
        crop_and_resize(loaded.image, size, Image.Resampling.LANCZOS),
        None if mask is None else crop_and_resize(mask, size, Image.Resampling.BOX),
    )


def crop_and_resize(image: Image.Image, size: Size, filter_: Image.Resampling) -> Image.Image:
    """Crop the largest centre part with the aspect ratio of a size, and resize it.

    Resampling from a box equals scaling and cropping, without the memory for the scaled image.
    """
    if image.size == size:
        return image
    across, down = image.width * size[1], image.height * size[0]
    width = image.width if across <= down else down / size[1]
    height = image.height if down <= across else across / size[0]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, filter_, box=(left, top, left + width, top + height))


def _size(size: Size | int) -> Size:
    return (size, size) if isinstance(size, int) else size


def _black_mask_error(part: str, path: Path) -> DataError:
    return DataError(
        f"the mask is black all over {part}, so no pixel would be trained",
        where=path,
        fix="paint the subject white, or crop image and mask around it",
    )


def _match_masks(folder: Path, paths: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path]:
    """Return image -> mask file.

    Args:
        folder: Folder of the masks.
        paths: The images that need a mask.
        images: All images of their folder.
    """
    mask_folder = scan_folder(folder)
    masks, unmatched = match_by_name(mask_folder.images, images)
    unused = [f"{path.name} (no image of that name)" for path in unmatched]
    warn_ignored(
        folder, [*unused, *(path.name for path in mask_folder.captions), *mask_folder.ignored]
    )
    for picture, files in masks.items():
        # A mask with the exact name takes precedence.
        files.sort(key=lambda path: not has_exact_name(path, picture))
        if len(files) > 1 and has_exact_name(files[0], picture) == has_exact_name(
            files[1], picture
        ):
            raise DataError(
                f"{files[0].name} and {files[1].name} are masks of the same image",
                where=folder,
                fix="keep one of them",
            )
    missing = [path.name for path in paths if path not in masks]
    if missing:
        raise DataError(
            f"{count_images(missing)} no mask: {join_names(missing)}",
            where=folder,
            fix="give each image a mask of the same stem, such as 1.png for 1.jpg",
        )
    return {path: masks[path][0] for path in paths}
