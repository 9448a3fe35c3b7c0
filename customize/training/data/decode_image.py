"""Decoding picture files that nobody has looked at: whole, upright, in 8 bits."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from customize.errors import DataError
from customize.safe_read import MAX_IMAGE_BYTES, open_regular
from customize.training.data.image_folder import image_formats, list_suffixes

_MIN_SIDE = 16


def decode_image(path: Path, mode: str) -> Image.Image:
    """A picture file, upright by its EXIF rotation.

    Args:
        mode: "RGB": 8-bit sRGB, transparency laid on white; "L": 8-bit grey, laid on black.

    Raises:
        DataError: it is corrupt, animated, smaller than 16 pixels on a side or too large to decode
            safely.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with (
                open_regular(path, MAX_IMAGE_BYTES) as file,
                Image.open(file, formats=image_formats()[1]) as image,  # reads the header only
            ):
                _check_header(image, path)
                image.verify()  # checksums, which decoding does not look at; closes the file
        with (
            open_regular(path, MAX_IMAGE_BYTES) as file,
            Image.open(file, formats=image_formats()[1]) as image,
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
            fix=f"replace or remove it; pictures are {list_suffixes()}",
        ) from None
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise DataError(
            f"the picture cannot be read: {error}",
            where=path,
            fix="save it anew from the original, or remove it",
        ) from error


def _check_header(image: Image.Image, path: Path) -> None:
    # MPO is a JPEG photograph with more in it, such as a phone's depth map, and HEIF may have more
    # pictures as well: the first is meant.
    if getattr(image, "n_frames", 1) > 1 and image.format not in ("MPO", "HEIF"):
        raise DataError(
            "the picture is animated", where=path, fix="save the frame that you mean as a PNG"
        )
    if min(image.size) < _MIN_SIDE:
        raise DataError(
            f"the picture is only {format_size(image.size)} pixels",
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


def format_size(size: tuple[int, int]) -> str:
    """A size in pixels, in words."""
    return f"{size[0]} x {size[1]}"
