"""``--regions``: words of the prompt, and a box or the file of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from customize.errors import ConfigError, DataError
from customize.near_names import suggest_paths
from customize.safe_read import MAX_IMAGE_BYTES, open_regular

_FLAG = "--regions"
_FORM = "write for example '<rex>=0,0,0.5,1' (left, top, right, bottom) or '<rex>=mask.png'"


def parse_regions(texts: Sequence[str]) -> dict[str, Any]:
    """Parse ``["<rex>=0,0,.5,1", "<tom>=mask.png"]`` for ``pipe(..., regions=)``.

    Returns:
        Words -> box (left, top, right, bottom) or mask, a PIL image of mode L; in order.

    Raises:
        ConfigError: A text has no words or no region, or two texts have the same words.
        DataError: A mask file cannot be read as an image.
    """
    parsed: dict[str, Any] = {}
    for text in texts:
        words, equals, region = (part.strip() for part in text.partition("="))
        if not words or not equals or not region:
            raise ConfigError(f"invalid region {text!r}", where=_FLAG, fix=_FORM)
        if words in parsed:
            raise ConfigError(
                f"two regions for {words!r}",
                where=_FLAG,
                fix="give one; a mask can have several parts",
            )
        parsed[words] = _box(text, region) or _mask(Path(region))
    return parsed


def check_regions(
    prompts: Sequence[str],
    regions: Mapping[str, Any],
    words: Mapping[str, str],
    flag: str = _FLAG,
) -> None:
    """Check that each prompt contains the words of each region, or of other things named so.

    Args:
        prompts: All prompts of the command.
        regions: Words or concept names -> region.
        words: Concept name -> its words in a prompt.
        flag: The flag that names them, for messages.

    Raises:
        ConfigError: A prompt lacks the words; the error suggests similar words of the prompt.
    """
    from customize.concepts.tokens.prompt_phrases import check_phrases, find_phrase

    for prompt in prompts if regions else ():
        phrases = [
            words[key] if key in words and find_phrase(words[key], prompt) else key
            for key in regions
        ]
        check_phrases(prompt, phrases, [*words.values(), *words], flag)


def _box(text: str, region: str) -> tuple[float, ...] | None:
    parts = region.strip("()[]").split(",")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        return None
    if len(numbers) != 4:
        raise ConfigError(
            f"the box {text!r} has {len(numbers)} numbers, not 4", where=_FLAG, fix=_FORM
        )
    return numbers


def _mask(path: Path) -> Any:
    import warnings

    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path, MAX_IMAGE_BYTES) as file, Image.open(file) as picture:
                return picture.convert("L")
    except Exception as error:  # decoders raise all kinds of errors on damaged files
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"the region is neither a box nor a readable mask: {reason}",
            where=f"{_FLAG} {path}",
            fix=suggest_paths(path, _FORM),
        ) from error
