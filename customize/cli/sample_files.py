"""Pictures that were drawn before, and their prompts as scorers are to read them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customize.errors import ConfigError, DataError
from customize.safe_read import MAX_TABLE_BYTES, MAX_TEXT_BYTES, read_json, read_text

if TYPE_CHECKING:
    from customize.training.data.dataset import TrainingImage

_TRIGGER = re.compile(r"<[^<>\s]+>")
# A caption that says nothing of the place: for pictures that bring none.
_SILENT = "a photo"


def read_samples(folder: Path) -> list[TrainingImage]:
    """The pictures of a folder in the order of their names, with captions where they have any.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    from customize.training.data.dataset import read_training_images

    return read_training_images(folder, trigger=None, caption=_SILENT)


def read_prompts(
    samples: Sequence[TrainingImage], file: Path | None, class_word: str | None
) -> list[str] | None:
    """A prompt for each picture, triggers replaced by class words; None where none are known."""
    words: list[dict[str, str]] = [{} for _ in samples]
    if file is not None:
        lines = _lines(file)
        if len(lines) not in (1, len(samples)):
            raise DataError(
                f"there are {len(lines)} prompts for {len(samples)} pictures",
                where=file,
                fix="write one line for each picture in the order of their names, or one for all",
            )
        prompts = lines * len(samples) if len(lines) == 1 else lines
    else:
        beside = [sample.path.with_suffix(".json") for sample in samples]
        if not all(path.is_file() for path in beside):
            return None
        prompts = []
        for number, path in enumerate(beside):
            prompt, words[number] = _settings(path)
            prompts.append(prompt)
    return [_spoken(prompt, own, class_word) for prompt, own in zip(prompts, words, strict=True)]


def _spoken(prompt: str, words: Mapping[str, str], class_word: str | None) -> str:
    def replaced(match: re.Match[str]) -> str:
        word = class_word or words.get(match[0])
        if word is None:
            raise ConfigError(
                f"the prompt {prompt!r} has the trigger {match[0]}, which no scorer has ever read",
                where="--class-word",
                fix="give what it stands for, such as --class-word dog",
            )
        return word

    return _TRIGGER.sub(replaced, prompt)


def _settings(path: Path) -> tuple[str, dict[str, str]]:
    """The prompt and the class words that generate noted beside a picture."""
    try:
        values = read_json(path, MAX_TEXT_BYTES)
        words: dict[str, str] = {}
        for each in values["concepts"]:
            subjects = each.get("subjects", {})  # of a merge there may be several
            own = subjects or {each["trigger"]: each["class_word"]}
            words |= {str(trigger): str(word) for trigger, word in own.items()}
        return str(values["prompt"]), words
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"the picture's settings cannot be read: {reason}",
            where=path,
            fix="give --prompts",
        ) from error


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(file, MAX_TABLE_BYTES).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the prompts cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}",
            where=file,
            fix="give a text file with one prompt a line",
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError("there are no prompts", where=file, fix="write one a line")
    return lines
