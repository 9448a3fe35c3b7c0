"""Training pictures with their captions and masks, checked before any model is loaded.

Pictures are the jpg, jpeg, png and webp files directly in a folder. Each becomes upright 8-bit
sRGB; what cannot be read as that is refused by name, so that nothing is dropped in silence.
"""

from __future__ import annotations

import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from customize.errors import DataError
from customize.safe_read import MAX_PICTURE, open_regular
from customize.training.captions import count, listing, read_captions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

_OTHER_SUFFIXES = (".gif", ".bmp", ".heic", ".heif", ".avif", ".tif", ".tiff", ".jxl", ".jp2")
_FORMATS = ("JPEG", "PNG", "WEBP")
_MIN_SIDE = 16
_PICTURES = ", ".join(suffix[1:] for suffix in SUFFIXES)

logger = logging.getLogger(__name__)

#: (width, height) in pixels, as PIL has it.
Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One training picture.

    Attributes:
        path: the file that it came from.
        image: upright, mode RGB (8 bits, sRGB), at least 16 x 16.
        caption: one line of text.
        mask: mode L, of the image's size, 255 where it is learned; None: all of it is.
        digest: :func:`content_hash` of it before it was shrunk.
    """

    path: Path
    image: Image.Image
    caption: str
    mask: Image.Image | None = None
    digest: str = ""


def read_folder(
    folder: Path | str,
    *,
    trigger: str | None,
    caption: str | None = None,
    masks: Path | str | None = None,
    resolution: int | None = None,
    square: bool = True,
    limit: int | None = None,
    forbidden: Sequence[str] = (),
) -> list[Sample]:
    """The pictures of a folder in the order of their names, each with its caption and mask.

    A picture's caption is the .txt file of the same stem, else its line in metadata.jsonl
    (``{"file_name": ..., "text": ...}``), else the template. Subfolders, other files and hidden
    files are left out; subfolders and pictures of other kinds are logged.

    Args:
        trigger: the word that every caption must have and that fills the template; None for
            class pictures, whose captions are free.
        caption: the template, with {} for the trigger; None: every picture brings its caption.
        masks: folder with one picture for each picture, of the same stem and size; white is
            learned and black is not.
        resolution: crop and shrink to this now, as :func:`pixels` would: large photographs then
            need little memory.
        square: only the centre square is trained, so there the masks must not be black.
        limit: only the first so many pictures.
        forbidden: words that no caption may have: the triggers, of class pictures.

    Raises:
        DataError: the folder has no pictures or cannot be read; a picture is corrupt, animated,
            smaller than 16 pixels on a side or too large to decode safely; a caption is missing,
            unreadable, lacks the trigger or has what is forbidden; a mask is missing, black all
            over the part that trains or of another size.
    """
    folder = Path(folder)
    found = _pictures(folder)
    paths = found[:limit]
    captions = read_captions(
        folder, paths, found, template=caption, trigger=trigger, forbidden=forbidden
    )
    mask_paths = {} if masks is None else _mask_paths(Path(masks), paths)
    samples = []
    for path in paths:
        image = read_image(path)
        mask = read_mask(mask_paths[path], image.size, square) if path in mask_paths else None
        whole = Sample(path, image, captions[path], mask)
        whole = replace(whole, digest=content_hash(whole))
        samples.append(whole if resolution is None else _shrunk(whole, resolution))
    return samples


def read_image(path: Path) -> Image.Image:
    """A picture file as upright RGB: EXIF rotation applied, colours brought to sRGB by the
    embedded profile, 16 bits scaled to 8, transparency laid on white.

    Raises:
        DataError: see :func:`read_folder`.
    """
    return _decode(path, "RGB")


def read_mask(path: Path, size: Size, square: bool = True) -> Image.Image:
    """A mask file as upright grayscale (mode L); what is transparent counts as black.

    Args:
        size: of its picture, after EXIF rotation.
        square: only the centre square is trained.

    Raises:
        DataError: it cannot be read, has another size or is black wherever it would train.
    """
    mask = _decode(path, "L")
    if mask.size != size:
        raise DataError(
            f"the mask is {_by(mask.size)} pixels and its picture {_by(size)}",
            where=path,
            fix="give both the same size",
        )
    trained = (min(size), min(size)) if square else size
    if _fitted(mask, trained, Image.Resampling.BOX).getextrema() == (0, 0):
        raise _black("the centre square" if square else "it", path)
    return mask


def pixels(sample: Sample, size: Size | int) -> Tensor:
    """The picture's largest centre part of this shape, at this size (an int: a square): (3,
    height, width), float32, in [-1, 1]; resampled with Lanczos."""
    image = _fitted(sample.image, _size(size), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values.permute(2, 0, 1).contiguous() / 127.5 - 1.0


def mask_tensor(sample: Sample, size: Size | int) -> Tensor:
    """The mask over the same part as :func:`pixels`: (1, height, width), float32, in [0, 1]; all
    ones without a mask. Each value is the mean over its area, so give the latents' size to get a
    mask for latents.

    Raises:
        DataError: it is black all over that part.
    """
    width, height = _size(size)
    if sample.mask is None:
        return torch.ones(1, height, width)
    mask = _fitted(sample.mask, (width, height), Image.Resampling.BOX)
    if mask.getextrema() == (0, 0):
        raise _black("the part of the picture that is trained", sample.path)
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None] / 255.0


def content_hash(sample: Sample) -> str:
    """SHA-256 over picture, caption and mask, in hexadecimal; the file's name does not count."""
    digest = hashlib.sha256()
    for image in (sample.image, sample.mask):
        if image is not None:
            digest.update(f"{image.mode} {image.width} {image.height} ".encode())
            digest.update(image.tobytes())
    digest.update(sample.caption.encode())
    return digest.hexdigest()


def _decode(path: Path, mode: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open_regular(path, MAX_PICTURE) as file,
                Image.open(file, formats=_FORMATS) as image,  # reads the header only
            ):
                _check_header(image, path)
                image.verify()  # checksums, which decoding does not look at; closes the file
        with (
            open_regular(path, MAX_PICTURE) as file,
            Image.open(file, formats=_FORMATS) as image,
        ):
            upright = ImageOps.exif_transpose(image)
            return _to_rgb(upright) if mode == "RGB" else _to_gray(upright)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(
            f"the picture has more than {Image.MAX_IMAGE_PIXELS} pixels, which may be an attack",
            where=path,
            fix="shrink it; training uses far fewer pixels",
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            "the file is damaged or no picture of a known kind",
            where=path,
            fix=f"replace or remove it; pictures are {_PICTURES}",
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise DataError(
            f"the picture cannot be read: {error}",
            where=path,
            fix="save it anew from the original, or remove it",
        ) from error


def _check_header(image: Image.Image, path: Path) -> None:
    # MPO is a JPEG photograph with more in it, such as a phone's depth map: the first is meant.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise DataError(
            "the picture is animated", where=path, fix="save the frame that you mean as a PNG"
        )
    if min(image.size) < _MIN_SIDE:
        raise DataError(
            f"the picture is only {_by(image.size)} pixels",
            where=path,
            fix=f"give pictures of at least {_MIN_SIDE} pixels a side",
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _eight_bit(image)
    if not image.has_transparency_data:
        return _srgb(image, profile)
    opaque = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(_srgb(opaque.convert("RGB"), profile), mask=opaque.getchannel("A"))
    return white


def _to_gray(image: Image.Image) -> Image.Image:
    image = _eight_bit(image)
    if not image.has_transparency_data:
        return image.convert("L")
    opaque = image.convert("RGBA")
    black = Image.new("L", image.size, 0)
    black.paste(opaque.convert("L"), mask=opaque.getchannel("A"))
    return black


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grayscale scaled to 8 bits; PIL's own conversion would clip it to white, and forget
    the value that a PNG may name as transparent."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    gray = Image.fromarray((values / 257.0).round().clip(0, 255).astype(np.uint8))  # 65535 / 255
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return gray
    opaque = np.where(values == clear, 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(opaque)))


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB, by the embedded profile where there is one that fits."""
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            managed = ImageCms.profileToProfile(
                image, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (OSError, ImageCms.PyCMSError):  # damaged, or of another colour space
            managed = None
        if managed is not None:
            return managed
    return image.convert("RGB")


def _shrunk(sample: Sample, side: int) -> Sample:
    size = (side, side)
    mask = None if sample.mask is None else _fitted(sample.mask, size, Image.Resampling.BOX)
    return replace(sample, image=_fitted(sample.image, size, Image.Resampling.LANCZOS), mask=mask)


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


def _pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, sorted by name."""
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        nested = [entry.name for entry in entries if entry.is_dir()]
        pictures = [e for e in entries if e.suffix.lower() in SUFFIXES and e.is_file()]
    except OSError as error:
        raise DataError(
            f"the folder of pictures cannot be read: {error.strerror}",
            where=folder,
            fix=f"give a folder with {_PICTURES} files",
        ) from None
    if not pictures:
        raise DataError(
            "there are no pictures in the folder"
            + (f"; subfolders are not searched: {listing(nested)}" if nested else ""),
            where=folder,
            fix=f"put {_PICTURES} files directly in it",
        )
    others = [e.name for e in entries if e.suffix.lower() in _OTHER_SUFFIXES and e.is_file()]
    if nested:
        logger.warning("Subfolders of %s are ignored: %s", folder, listing(nested))
    if others:
        logger.warning("Only %s files of %s are read, not %s", _PICTURES, folder, listing(others))
    return pictures


def _mask_paths(folder: Path, paths: list[Path]) -> dict[Path, Path]:
    by_stem: dict[str, Path] = {}
    for mask in _pictures(folder):
        if mask.stem in by_stem:
            raise DataError(
                f"{by_stem[mask.stem].name} and {mask.name} are masks of the same picture",
                where=folder,
                fix="keep one of them",
            )
        by_stem[mask.stem] = mask
    missing = [path.name for path in paths if path.stem not in by_stem]
    if missing:
        raise DataError(
            f"{count(missing)} no mask: {listing(missing)}",
            where=folder,
            fix="give each picture a mask of the same stem, such as 1.png for 1.jpg",
        )
    return {path: by_stem[path.stem] for path in paths}


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
