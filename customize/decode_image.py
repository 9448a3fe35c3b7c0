"""Decoding of untrusted image files to upright 8-bit images."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from customize.errors import DataError
from customize.image_folder import image_formats, list_suffixes
from customize.near_names import suggest_paths
from customize.safe_read import MAX_IMAGE_BYTES, open_regular

_MIN_SIDE = 16


def decode_image(
    path: Path, mode: str, *, on_animation: Callable[[Path], None] | None = None
) -> Image.Image:
    """Decode an image file and apply its EXIF rotation.

    Args:
        path: The file.
        mode: "RGB": 8-bit sRGB, composited on white; "L": 8-bit grayscale, composited on black.
        on_animation: Called with the path of an animation, whose first frame is taken; None: it is
            refused.

    Raises:
        DataError: The image is missing, corrupt, animated, smaller than 16 pixels on a side, or too
            large to decode safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open_regular(path, MAX_IMAGE_BYTES) as file,
                Image.open(file, formats=image_formats()[1]) as image,  # reads the header only
            ):
                check_size(image.size, path)
                if is_animated(image):
                    if on_animation is None:
                        raise DataError(
                            "the image is animated",
                            where=path,
                            fix="save the wanted frame as a PNG",
                        )
                    on_animation(path)
                image.verify()  # checksums, which decoding ignores; closes the file
        with (
            open_regular(path, MAX_IMAGE_BYTES) as file,
            Image.open(file, formats=image_formats()[1]) as image,
        ):
            return to_rgb(image) if mode == "RGB" else _to_gray(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            "the image does not exist", where=path, fix=suggest_paths(path, "check the path")
        ) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(
            f"the image has more than {Image.MAX_IMAGE_PIXELS} pixels, which may be an attack",
            where=path,
            fix="shrink it; models use far fewer pixels",
        ) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            "the file is damaged or not an image of a supported format",
            where=path,
            fix=f"replace or remove it; supported are {list_suffixes()}",
        ) from None
    except Exception as error:  # decoders raise any exception on damaged data
        raise DataError(
            f"the image cannot be read: {error}",
            where=path,
            fix="save it again from the original, or remove it",
        ) from error


def check_size(size: tuple[int, int], where: object) -> None:
    """Refuse images of fewer than 16 pixels on a side.

    Raises:
        DataError: The image is smaller.
    """
    if min(size) < _MIN_SIDE:
        raise DataError(
            f"the image is only {format_size(size)} pixels",
            where=where,
            fix=f"use images of at least {_MIN_SIDE} pixels on each side",
        )


def is_animated(image: Image.Image) -> bool:
    """Whether an image has several frames.

    MPO is a JPEG with additional images, such as a depth map, and HEIF may have several images: the
    first one is used.
    """
    return getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "HEIF")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to upright 8-bit sRGB, composited on white.

    The EXIF rotation and the embedded colour profile are applied.
    """
    image = ImageOps.exif_transpose(image)
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
    """Scale 16-bit grayscale to 8 bits and keep a PNG's transparent value.

    PIL's conversion would clip the values and drop the transparency.
    """
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
    """Convert to sRGB, by the embedded profile if it is valid for the image."""
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


def format_size(size: tuple[int, int]) -> str:
    """Format a size in pixels as "width x height"."""
    return f"{size[0]} x {size[1]}"
