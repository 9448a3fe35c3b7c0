"""Training pictures with their captions and masks, checked before any model is loaded.

Pictures are the JPEG, PNG and WebP files directly in a folder, and HEIC and AVIF files where these
can be read; see :mod:`customize.training.data.image_folder`. Each becomes upright 8-bit sRGB; what
cannot be read as that is refused by name, so that nothing is dropped silently.
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

from customize.errors import DataError
from customize.image_tensors import images_to_tensor
from customize.training.data.captions import read_captions
from customize.training.data.decode_image import decode_image, format_size
from customize.training.data.image_folder import (
    count_images,
    has_exact_name,
    join_names,
    match_by_name,
    scan_folder,
    warn_ignored,
)

_STRIP = 256  # rows

#: (width, height) in pixels, as PIL has it.
Size = tuple[int, int]


class ImageAndMask(NamedTuple):
    """A picture, mode RGB (8 bits, sRGB), and its mask of the same size, mode L, 255 where it is
    learned; None: all of it is."""

    image: Image.Image
    mask: Image.Image | None


@dataclass(frozen=True)
class TrainingImage:
    """One training picture.

    Attributes:
        path: the file that it came from.
        size: of the whole picture in pixels, upright, at least 16 x 16.
        caption: one line of text.
        loaded: the whole picture and its mask, or these cropped and shrunk; None: not in memory,
            so that :func:`load_image_and_mask` reads them again.
        mask_path: the file that the mask is in; None: there is no mask.
        templated: whether the caption is the template.
        digest: :func:`content_hash` of it before it was shrunk.
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
        """The picture; read again where it is not in memory."""
        return load_image_and_mask(self).image

    @property
    def mask(self) -> Image.Image | None:
        """The mask; read again where it is not in memory."""
        return load_image_and_mask(self).mask


def read_training_images(
    folder: Path | str,
    *,
    trigger: str | None,
    caption: str | None = None,
    masks: Path | str | None = None,
    resolution: int | None = None,
    hold: bool = True,
    square: bool = True,
    limit: int | None = None,
    forbidden: Sequence[str] = (),
) -> list[TrainingImage]:
    """The pictures of a folder in the order of their names, each with its caption and mask.

    A picture's caption is the text of the .txt or .caption file of its name, else its row in
    metadata.jsonl (``{"file_name": ..., "text": ...}``) or metadata.csv (columns ``file_name`` and
    ``text``), else the template. Subfolders, other files and captions of no picture are left out,
    and a warning names them.

    Args:
        trigger: the word that every caption must have and that fills the template; None for
            class pictures, whose captions are free.
        caption: the template, with {} for the trigger; None: every picture brings its caption.
        masks: folder with one picture for each picture, of the same stem and size; white is
            learned and black is not.
        resolution: crop and shrink to this now, as :func:`image_tensor` would, to save memory.
        hold: keep the pictures in memory; else :func:`load_image_and_mask` reads them again.
        square: only the centre square is trained, so there the masks must not be black.
        limit: only the first so many pictures.
        forbidden: words that no caption may have: the triggers, of class pictures.

    Raises:
        DataError: the folder has no pictures or cannot be read; a picture is corrupt, animated,
            smaller than 16 pixels on a side or too large to decode safely; a caption is missing,
            unreadable, lacks the trigger or has what is forbidden; a mask is missing, black all
            over the part that trains or of another size.
    """
    found = scan_folder(Path(folder))
    paths = found.images[:limit]
    captions = read_captions(found, paths, template=caption, trigger=trigger, forbidden=forbidden)
    # customize generate writes a .json beside each picture that evaluation reads.
    others = [name for name in found.ignored if trigger or not name.endswith(".json")]
    warn_ignored(found.path, [*captions.unused, *others])
    mask_paths = {} if masks is None else _mask_paths(Path(masks), paths, found.images)
    samples = []
    for path in paths:
        image = read_image(path)
        mask_path = mask_paths.get(path)
        mask = None if mask_path is None else read_mask(mask_path, image.size, square)
        whole = ImageAndMask(image, mask)
        text = captions.texts[path]
        sample = TrainingImage(
            path,
            image.size,
            text,
            whole if hold and resolution is None else None,
            mask_path,
            path in captions.templated,
            content_hash(whole, text),
        )
        if hold and resolution is not None:
            sample = replace(sample, loaded=_shrunk(whole, resolution))
        samples.append(sample)
    return samples


def load_image_and_mask(sample: TrainingImage) -> ImageAndMask:
    """A sample's picture and mask, read again where they are not in memory.

    Raises:
        DataError: they cannot be read, or have changed since.
    """
    if sample.loaded is not None:
        return sample.loaded
    image = read_image(sample.path)
    mask = None
    if sample.mask_path is not None:
        mask = read_mask(sample.mask_path, image.size, square=False)
    found = ImageAndMask(image, mask)
    if content_hash(found, sample.caption) != sample.digest:
        raise DataError(
            "the picture or its mask changed after the run began",
            where=sample.path,
            fix="run again when nothing writes to the folder",
        )
    return found


def read_image(path: Path) -> Image.Image:
    """A picture file as upright RGB: EXIF rotation applied, colours brought to sRGB by the
    embedded profile, 16 bits scaled to 8, transparency laid on white.

    Raises:
        DataError: see :func:`read_training_images`.
    """
    return decode_image(path, "RGB")


def read_mask(path: Path, size: Size, square: bool = True) -> Image.Image:
    """A mask file as upright grayscale (mode L); what is transparent counts as black.

    Args:
        size: of its picture, after EXIF rotation.
        square: only the centre square is trained.

    Raises:
        DataError: it cannot be read, has another size or is black wherever it would train.
    """
    mask = decode_image(path, "L")
    if mask.size != size:
        raise DataError(
            f"the mask is {format_size(mask.size)} pixels and its picture {format_size(size)}",
            where=path,
            fix="give both the same size",
        )
    trained = (min(size), min(size)) if square else size
    if _fitted(mask, trained, Image.Resampling.BOX).getextrema() == (0, 0):
        raise _black("the centre square" if square else "it", path)
    return mask


def image_tensor(sample: TrainingImage | ImageAndMask, size: Size | int) -> Tensor:
    """The picture's largest centre part of this shape, at this size (an int: a square): (3,
    height, width), float32, in [-1, 1]; resampled with Lanczos."""
    image = _fitted(sample.image, _size(size), Image.Resampling.LANCZOS)
    return images_to_tensor([image])[0].contiguous()


def mask_tensor(
    sample: TrainingImage, size: Size | int, loaded: ImageAndMask | None = None
) -> Tensor:
    """The mask over the same part as :func:`image_tensor`: (1, height, width), float32, in [0, 1];
    all ones without a mask. Each value is the mean over its area, so give the latents' size to get
    a mask for latents.

    Args:
        loaded: the sample's picture and mask, if they are in memory already.

    Raises:
        DataError: it is black all over that part.
    """
    width, height = _size(size)
    whole = (loaded or load_image_and_mask(sample)).mask
    if whole is None:
        return torch.ones(1, height, width)
    mask = _fitted(whole, (width, height), Image.Resampling.BOX)
    if mask.getextrema() == (0, 0):
        raise _black("the part of the picture that is trained", sample.path)
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255.0


def content_hash(loaded: ImageAndMask, caption: str) -> str:
    """SHA-256 over picture, mask and caption, in hexadecimal; the file's name does not count."""
    digest = hashlib.sha256()
    for image in loaded:
        if image is not None:
            digest.update(f"{image.mode} {image.width} {image.height} ".encode())
            for top in range(0, image.height, _STRIP):  # no copy of the whole picture
                bottom = min(top + _STRIP, image.height)
                digest.update(image.crop((0, top, image.width, bottom)).tobytes())
    digest.update(caption.encode())
    return digest.hexdigest()


def _shrunk(loaded: ImageAndMask, side: int) -> ImageAndMask:
    size, mask = (side, side), loaded.mask
    return ImageAndMask(
        _fitted(loaded.image, size, Image.Resampling.LANCZOS),
        None if mask is None else _fitted(mask, size, Image.Resampling.BOX),
    )


def _fitted(image: Image.Image, size: Size, filter_: Image.Resampling) -> Image.Image:
    """The largest centre part of this shape, resized. Resampling from a box gives what scaling and
    cropping would, and a long narrow picture needs no more memory than a square one."""
    if image.size == size:
        return image
    across, down = image.width * size[1], image.height * size[0]
    width = image.width if across <= down else down / size[1]
    height = image.height if down <= across else across / size[0]
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, filter_, box=(left, top, left + width, top + height))


def _size(size: Size | int) -> Size:
    return (size, size) if isinstance(size, int) else size


def _black(part: str, path: Path) -> DataError:
    return DataError(
        f"the mask is black all over {part}, so nothing would be learned",
        where=path,
        fix="paint the subject white, or crop picture and mask with it in the middle",
    )


def _mask_paths(folder: Path, paths: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path]:
    """Picture -> its mask.

    Args:
        paths: the pictures that need one.
        images: all pictures beside them.
    """
    found = scan_folder(folder)
    masks, unmatched = match_by_name(found.images, images)
    unused = [f"{path.name} (no picture of that name)" for path in unmatched]
    warn_ignored(folder, [*unused, *(path.name for path in found.captions), *found.ignored])
    for picture, files in masks.items():
        # A mask with exactly the name of a picture is of that one.
        files.sort(key=lambda path: not has_exact_name(path, picture))
        if len(files) > 1 and has_exact_name(files[0], picture) == has_exact_name(
            files[1], picture
        ):
            raise DataError(
                f"{files[0].name} and {files[1].name} are masks of the same picture",
                where=folder,
                fix="keep one of them",
            )
    missing = [path.name for path in paths if path not in masks]
    if missing:
        raise DataError(
            f"{count_images(missing)} no mask: {join_names(missing)}",
            where=folder,
            fix="give each picture a mask of the same stem, such as 1.png for 1.jpg",
        )
    return {path: masks[path][0] for path in paths}
