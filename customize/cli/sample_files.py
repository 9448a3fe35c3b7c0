"""Images to score, and their prompts with triggers replaced by class words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customize.errors import ConfigError, DataError
from customize.safe_read import MAX_TABLE_BYTES, MAX_TEXT_BYTES, read_json, read_text
from customize.text import plural

if TYPE_CHECKING:
    from customize.training.data.dataset import TrainingImage

_TRIGGER = re.compile(r"<[^<>\s]+>")
# For images without a caption: names neither an object nor a background.
_NEUTRAL_CAPTION = "a photo"


def read_samples(folder: Path) -> list[TrainingImage]:
    """Read the images of a folder in the order of file names, with their captions if any.

    Raises:
        DataError: The folder has no images, or one cannot be read.
    """
    from customize.training.data.dataset import read_training_images

    return read_training_images(folder, trigger=None, caption=_NEUTRAL_CAPTION)


def read_prompts(
    samples: Sequence[TrainingImage], file: Path | None, class_word: str | None
) -> list[str] | None:
    """Read a prompt for each image, and replace triggers by class words.

    Args:
        samples: The images.
        file: File with one prompt per image and line, or one prompt for all; None: the prompts in
            the JSON files of ``customize generate`` beside the images.
        class_word: Class word that replaces triggers; None: the class words in the JSON files.

    Returns:
        As many prompts as images; None without a file and without JSON files.

    Raises:
        DataError: The file or a JSON file is not readable, or the number of prompts differs.
        ConfigError: The class word of a trigger is unknown.
    """
    words: list[dict[str, str]] = [{} for _ in samples]
    if file is not None:
        lines = _read_lines(file)
        if len(lines) not in (1, len(samples)):
            raise DataError(
                f"{plural(len(lines), 'prompt')} for {plural(len(samples), 'image')}",
                where=file,
                fix="write one line per image in the order of file names, or one line for all",
            )
        prompts = lines * len(samples) if len(lines) == 1 else lines
    else:
        json_files = [sample.path.with_suffix(".json") for sample in samples]
        if not all(path.is_file() for path in json_files):
            return None
        prompts = []
        for number, path in enumerate(json_files):
            prompt, words[number] = _read_settings(path)
            prompts.append(prompt)
    return [
        _replace_triggers(prompt, class_words, class_word)
        for prompt, class_words in zip(prompts, words, strict=True)
    ]


def _replace_triggers(prompt: str, words: Mapping[str, str], class_word: str | None) -> str:
    def replace(match: re.Match[str]) -> str:
        word = class_word or words.get(match[0])
        if word is None:
            raise ConfigError(
                f"the class word of {match[0]} in the prompt {prompt!r} is unknown",
                where="--class-word",
                fix="give it, for example --class-word dog",
            )
        return word

    return _TRIGGER.sub(replace, prompt)


def _read_settings(path: Path) -> tuple[str, dict[str, str]]:
    """The prompt, and trigger -> class word, from a JSON file of ``customize generate``."""
    try:
        values = read_json(path, MAX_TEXT_BYTES)
        words: dict[str, str] = {}
        for entry in values["concepts"]:
            # A merge has several subjects.
            subjects = entry.get("subjects", {}) or {entry["trigger"]: entry["class_word"]}
            words |= {str(trigger): str(word) for trigger, word in subjects.items()}
        return str(values["prompt"]), words
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"the image's settings cannot be read: {reason}",
            where=path,
            fix="give --prompts",
        ) from error


def _read_lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(file, MAX_TABLE_BYTES).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the prompts cannot be read: {getattr(error, 'strerror', None) or 'not a text file'}",
            where=file,
            fix="give a text file with one prompt per line",
        ) from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError("the file has no prompts", where=file, fix="write one per line")
    return lines
