"""Regions as the command line has them: words of the prompt, and a box or the file of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from customize.errors import ConfigError, DataError
from customize.near_names import suggest_paths
from customize.safe_read import MAX_IMAGE_BYTES, open_regular

_WHERE = "--regions"
_FORM = "write it such as '<rex>=0,0,0.5,1' (left, top, right, bottom) or '<rex>=mask.png'"


def parse_regions(texts: Sequence[str]) -> dict[str, Any]:
    """``["<rex>=0,0,.5,1", "<tom>=mask.png"]`` as ``pipe(..., regions=)`` takes it.

    Returns:
        Words -> box of four numbers, or mask as a PIL picture of mode L; in the order given.

    Raises:
        ConfigError: a text has no words or no region, or the same words are given twice.
        DataError: the file of a mask is not there, or no picture.
    """
    found: dict[str, Any] = {}
    for text in texts:
        words, equals, region = (part.strip() for part in text.partition("="))
        if not words or not equals or not region:
            raise ConfigError(f"{text!r} is no region", where=_WHERE, fix=_FORM)
        if words in found:
            raise ConfigError(
                f"{words!r} is given two regions",
                where=_WHERE,
                fix="give each once; one mask can have several parts",
            )
        found[words] = _box(text, region) or _mask(Path(region))
    return found


def check_regions(
    prompts: Sequence[str], regions: Mapping[str, Any], words: Mapping[str, str]
) -> None:
    """Refuse regions for words that a prompt lacks, before anything is loaded.

    Args:
        words: concept's name -> what calls it in a prompt.

    Raises:
        ConfigError: naming the words, and those of the prompt that are near.
    """
    from customize.concepts.tokens.prompt_phrases import check_phrases, find_phrase

    for prompt in prompts if regions else ():
        said = [
            words[key] if key in words and find_phrase(words[key], prompt) else key
            for key in regions
        ]
        check_phrases(prompt, said, [*words.values(), *words], _WHERE)


def _box(text: str, region: str) -> tuple[float, ...] | None:
    parts = region.strip("()[]").split(",")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        return None
    if len(numbers) != 4:
        raise ConfigError(f"{text!r} has {len(numbers)} numbers", where=_WHERE, fix=_FORM)
    return numbers


def _mask(path: Path) -> Any:
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path, MAX_IMAGE_BYTES) as file, Image.open(file) as picture:
                return picture.convert("L")
    except Exception as error:  # whatever a decoder may raise on bytes of others
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"the region is no box, and no mask that can be read: {reason}",
            where=f"{_WHERE} {path}",
            fix=suggest_paths(path, _FORM),
        ) from error
