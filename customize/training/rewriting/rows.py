"""The rows that a rewriter is trained on: prompts, mostly with rewritings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from customize.concepts.io.data_files import parse_json
from customize.errors import ConfigError, DataError, PipelineError
from customize.safe_read import read_bytes
from customize.text import quote

if TYPE_CHECKING:
    from customize.rewriting.instructions import Instructions
    from customize.rewriting.local_model import LocalModel

#: Largest size of a file of rows, in bytes.
MAX_BYTES = 1 << 28


def read_rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    """Read the rows of a .jsonl file, or, where rows are prompts alone, of a .txt file.

    Args:
        path: The file.
        fields: Fields of each row; others are ignored.

    Raises:
        DataError: The file cannot be read, has no rows, or a line lacks a field.
    """
    if path.suffix.lower() == ".txt" and tuple(fields) == ("prompt",):
        return [{"prompt": prompt} for prompt in read_prompts(path)]
    rows = list(_parse_lines(path, fields))
    if not rows:
        raise DataError("the file has no rows", where=path, fix=_example(fields))
    return rows


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not empty.

    Raises:
        DataError: It cannot be read, or has no prompts.
    """
    lines = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not lines:
        raise DataError("it has no prompts", where=path, fix="write a prompt in each line")
    return lines


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror or error}",
            where=path,
            fix=f"check the path; a file has at most {MAX_BYTES >> 20} MiB",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8 text", where=path, fix="save it as UTF-8") from error


def _parse_lines(path: Path, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or not all(
            isinstance(values.get(name), str) and values[name].strip() for name in fields
        ):
            raise DataError(f"line {number} is {quote(line, 80)}", where=path, fix=_example(fields))
        row = {name: values[name] for name in fields}
        if "chosen" in row and row["chosen"] == row.get("rejected"):
            raise DataError(
                f"line {number} prefers {quote(row['chosen'], 80)} to itself",
                where=path,
                fix="give another rejected text, or leave the line out",
            )
        yield row


def _example(fields: Sequence[str]) -> str:
    example = ", ".join(f'"{name}": "..."' for name in fields)
    return f"write {{{example}}} in each line"


def render_prompt(prompt: str, instructions: Instructions, model: LocalModel) -> str:
    """Return the question for a better prompt as trl's text: as the model will read it.

    Chats are rendered here because trl's own rendering drops what a template puts before an answer,
    such as the empty reasoning of Qwen 3, so that training and completion would differ.

    Raises:
        PipelineError: The tokenizer puts tokens around a text that its chat template does not.
    """
    return _without_added_tokens(model, model.render(instructions.messages(prompt)))


def check_length(number: int, length: int, limit: int, where: Path) -> None:
    """Refuse a row that trl would cut off, or drop without a word.

    Args:
        number: Number of the row, from 1.
        length: Its tokens, with instructions and rewriting.
        limit: The setting ``max_length``.
        where: The file of the rows, for the error.

    Raises:
        ConfigError: The row is longer than the limit.
    """
    if length > limit:
        raise ConfigError(
            f"row {number} has {length:,} tokens with its instructions",
            where=where,
            fix=f"shorten it, or set max_length to at least {length}",
        )


def _without_added_tokens(model: LocalModel, text: str) -> str:
    """Return a text that tokenizes, with the tokens that the tokenizer adds, as the chat."""
    tokenizer = model.tokenizer
    expected = tokenizer(text, add_special_tokens=False).input_ids
    for candidate in (text, text.removeprefix(tokenizer.bos_token or "")):
        if tokenizer(candidate).input_ids == expected:
            return candidate
    raise PipelineError(
        "the tokenizer of the language model adds tokens that its chat template does not have",
        where=model.name,
        fix="set add_bos_token and add_eos_token to false in its tokenizer_config.json",
    )
