"""The rows that a rewriter is trained on: prompts with rewritings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from customize.concepts.io.data_files import parse_json
from customize.errors import DataError, PipelineError
from customize.rewriting.instructions import Instructions
from customize.rewriting.local_model import LocalModel
from customize.safe_read import read_bytes
from customize.text import quote

Method = Literal["sft", "dpo"]

#: Method -> fields of its rows.
FIELDS: dict[Method, tuple[str, ...]] = {
    "sft": ("prompt", "text"),
    "dpo": ("prompt", "chosen", "rejected"),
}

#: Largest size of a file of rows, in bytes.
MAX_BYTES = 1 << 28


def read_rows(path: Path, method: Method) -> list[dict[str, str]]:
    """Read the rows of a .jsonl file; fields of other methods are ignored.

    Raises:
        DataError: The file cannot be read, has no rows, or a line lacks a field.
    """
    rows = list(_parse_lines(path, method))
    if not rows:
        raise DataError("the file has no rows", where=path, fix=_example(method))
    return rows


def _parse_lines(path: Path, method: Method) -> Iterator[dict[str, str]]:
    try:
        text = read_bytes(path, MAX_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror or error}",
            where=path,
            fix=f"check the path; a file has at most {MAX_BYTES >> 20} MiB",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError("the file is not UTF-8 text", where=path, fix="save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except (ValueError, RecursionError):
            values = None
        fields = FIELDS[method]
        if not isinstance(values, dict) or not all(
            isinstance(values.get(name), str) and values[name].strip() for name in fields
        ):
            raise DataError(f"line {number} is {quote(line, 80)}", where=path, fix=_example(method))
        yield {name: values[name] for name in fields}


def _example(method: Method) -> str:
    fields = ", ".join(f'"{name}": "..."' for name in FIELDS[method])
    return f"write {{{fields}}} in each line"


def as_texts(
    rows: Sequence[Mapping[str, str]],
    method: Method,
    instructions: Instructions,
    model: LocalModel,
) -> list[dict[str, str]]:
    """Return the rows as trl's texts: the question as the model will read it, with the answers.

    Chats are rendered here because trl's own rendering drops what a template puts before an answer,
    such as the empty reasoning of Qwen 3, so that training and completion would differ.

    Raises:
        PipelineError: The tokenizer puts tokens around a text that its chat template does not.
    """
    names = {"text": "completion"} if method == "sft" else {}
    return [
        {
            "prompt": _without_added_tokens(
                model, model.render(instructions.messages(row["prompt"]))
            ),
            **{names.get(name, name): row[name] + model.end for name in FIELDS[method][1:]},
        }
        for row in rows
    ]


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
