"""The rows of a training as text that trl tokenizes, which the model reads to its end."""

from __future__ import annotations

from collections.abc import Mapping

from customize.errors import ConfigError, PipelineError
from customize.rewriting.instructions import Instructions
from customize.rewriting.local_model import LocalModel
from customize.training.rewriting.methods.method import RewriterRun


def render_prompt(prompt: str, instructions: Instructions, model: LocalModel) -> str:
    """Return the question for a better prompt as trl's text: as the model will read it.

    Chats are rendered here because trl's own rendering drops what a template puts before an answer,
    such as the empty reasoning of Qwen 3, so that training and completion would differ.

    Raises:
        PipelineError: The tokenizer puts tokens around a text that its chat template does not.
    """
    return _without_added_tokens(model, model.render(instructions.messages(prompt)))


def render_rows(run: RewriterRun, answers: Mapping[str, str]) -> list[dict[str, str]]:
    """Return the rows of a training on answers, as trl reads them.

    Args:
        run: The training.
        answers: Name of an answer in trl's rows -> its field in the data.

    Raises:
        ConfigError: A row is longer than ``max_length``.
        PipelineError: The tokenizer adds tokens that the chat template does not have.
    """
    texts = []
    for number, row in run.rows.items():
        prompt = render_prompt(row["prompt"], run.settings.instructions, run.model)
        ended = {name: row[field] + run.model.end for name, field in answers.items()}
        length = max(run.model.count_tokens(prompt + answer) for answer in ended.values())
        check_length(run, number, length)
        texts.append({"prompt": prompt, **ended})
    return texts


def check_length(run: RewriterRun, number: int, length: int) -> None:
    """Refuse a row that trl would cut off, or drop without a word, or the model cannot read.

    Args:
        run: The training.
        number: Number of its line in the file, from 1.
        length: Its tokens, with instructions and rewriting.

    Raises:
        ConfigError: The row is longer than ``max_length``, or than the model reads.
    """
    limit = run.model.context_length
    if limit is not None and length > limit:
        raise ConfigError(
            f"line {number} has {length:,} tokens with its instructions, and the language model "
            f"reads {limit:,}",
            where=run.config.data,
            fix="shorten it",
        )
    if length > run.config.max_length:
        raise ConfigError(
            f"line {number} has {length:,} tokens with its instructions",
            where=run.config.data,
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
