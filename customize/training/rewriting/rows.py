"""The rows that a rewriter is trained on: prompts, mostly with rewritings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from customize.concepts.io.data_files import parse_json
from customize.errors import DataError
from customize.rewriting.prompt_characters import find_control_character
from customize.safe_read import read_bytes
from customize.text import quote

#: Largest size of a file of rows, in bytes.
MAX_BYTES = 1 << 28


def read_rows(path: Path, fields: Sequence[str]) -> dict[int, dict[str, str]]:
    """Read the rows of a .jsonl file, or, where rows are prompts alone, of a .txt file.

    Args:
        path: The file.
        fields: Fields of each row; others are ignored.

    Returns:
        Number of a line, from 1 -> its fields.

    Raises:
        DataError: The file cannot be read, has no rows, or a line lacks a field or has control
            characters.
    """
    if path.suffix.lower() == ".txt" and tuple(fields) == ("prompt",):
        return {number: {"prompt": prompt} for number, prompt in read_prompts(path).items()}
    rows = dict(_parse_lines(path, fields))
    if not rows:
        raise DataError("the file has no rows", where=path, fix=_example(fields))
    return rows


def read_prompts(path: Path) -> dict[int, str]:
    """Return the lines of a text file that are not empty: number of the line, from 1 -> prompt.

    Raises:
        DataError: The file cannot be read, has no prompts, or a line has control characters.
    """
    lines = enumerate(_read_text(path).split("\n"), start=1)
    prompts = {number: line.strip() for number, line in lines if line.strip()}
    if not prompts:
        raise DataError("it has no prompts", where=path, fix="write a prompt in each line")
    for number, prompt in prompts.items():
        _check_characters(path, number, prompt)
    return prompts


def _check_characters(path: Path, number: int, text: str) -> None:
    char = find_control_character(text)
    if char is not None:
        raise DataError(
            f"line {number} has the control character {quote(char)} in {quote(text, 80)}",
            where=path,
            fix="remove it",
        )


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


def _parse_lines(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
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
        for text in row.values():
            _check_characters(path, number, text)
        if "chosen" in row and row["chosen"] == row.get("rejected"):
            raise DataError(
                f"line {number} prefers {quote(row['chosen'], 80)} to itself",
                where=path,
                fix="give another rejected text, or leave the line out",
            )
        yield number, row


def _example(fields: Sequence[str]) -> str:
    example = ", ".join(f'"{name}": "..."' for name in fields)
    return f"write {{{example}}} in each line"
