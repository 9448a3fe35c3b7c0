"""What several commands need: numbers from text, a pipeline, tables, files that are whole."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from customize.atomic import write_atomic
from customize.cli import interrupts
from customize.errors import (
    ConfigError,
    PipelineError,
    StorageError,
    storage_error,
    system_errno,
)
from customize.near_names import suggest_names
from customize.text import escape_unprintable

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = ("float32", "float16", "bfloat16")


class Interrupted(Exception):
    """Ctrl-C; the text says how to go on."""


def on_interrupt(text: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a command end with :class:`Interrupted` and this text on Ctrl-C."""

    def decorate(command: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(command)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            interrupts.current.advice = text
            try:
                return command(*args, **kwargs)
            except KeyboardInterrupt:
                raise Interrupted(text) from None

        return run

    return decorate


def console(stderr: bool = False) -> Console:
    """Where to print. Silent in all but the first of several processes (accelerate, torchrun).

    What is printed shows as it is: square brackets are no markup, and control characters in texts
    of others are escaped.
    """
    from rich.console import Console
    from rich.segment import Segment

    class HarmlessConsole(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                text, style, control = segment
                yield segment if control else Segment(escape_unprintable(text), style)

    quiet = os.environ.get("RANK", "0") != "0"
    return HarmlessConsole(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)


def parse_weight_list(text: str | None, count: int) -> list[float] | None:
    """``"1,0.8"`` as numbers, one a concept; None where nothing was given.

    Raises:
        ConfigError: not numbers, not finite, or not ``count`` of them.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise ConfigError(
            f"the weights {text!r} are not numbers with commas between them",
            where="--weights",
            fix="write them such as --weights 1,0.8",
        )
    if len(weights) != count:
        raise ConfigError(
            f"{len(weights)} weights were given for {count} concepts",
            where="--weights",
            fix="give one weight for each concept, in their order",
        )
    return weights


def rename_concepts(
    concepts: Sequence[Adaptation | LoraFile], text: str | None
) -> list[Adaptation | LoraFile]:
    """The concepts under the names of a text such as ``"rex,,tom-2"``; None: their own.

    Raises:
        ConfigError: not as many as concepts.
        ConceptError: one is not the name of a concept.
    """
    from dataclasses import replace

    from customize.concepts.formats.lora_file import LoraFile, name_from_file

    if text is None:
        return list(concepts)
    names = [name.strip() for name in text.split(",")]
    if len(names) != len(concepts):
        raise ConfigError(
            f"{len(names)} names were given for {len(concepts)} concepts",
            where="--names",
            fix="give one for each, in their order, or nothing between two commas for its own",
        )

    def called(concept: Adaptation | LoraFile, name: str) -> Adaptation | LoraFile:
        if not name:
            return concept
        if isinstance(concept, LoraFile):
            return replace(concept, name=name_from_file(name))
        return concept.renamed(name)

    return [called(concept, name) for concept, name in zip(concepts, names, strict=True)]


def check_steps(pipe: Any, steps: int | None) -> None:
    """Refuse more sampling steps than the scheduler has noise levels.

    Raises:
        ConfigError: there are too many.
    """
    most = pipe.scheduler.config.get("num_train_timesteps")
    if steps is not None and most is not None and steps > most:
        raise ConfigError(
            f"the base's scheduler has {most} noise levels, fewer than {steps} steps",
            where="--steps",
            fix=f"choose at most {most}; 25 to 50 are usual",
        )


def check_output_file(path: Path | None) -> None:
    """See that a result can be written, before the work for it begins.

    Raises:
        StorageError: it can't.
    """
    if path is None:
        return
    from customize.concepts.io.output_folder import check_writable

    if os.path.isdir(path):
        raise StorageError("a folder is in the place of the file", where=path, fix="name a file")
    check_writable(path.parent)


def check_png(path: Path | None, flag: str) -> None:
    """Refuse what no picture can be written to.

    Raises:
        ConfigError: not a .png, or its folder is not there.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"{path} is no .png", where=flag, fix=f"name it such as {path.stem}.png")
    if path is not None and not os.path.isdir(path.absolute().parent):
        raise ConfigError(f"there is no folder {path.parent}", where=flag, fix="make it first")


def refuse_flags(context: Any, names: Sequence[str], mode: str) -> None:
    """Refuse flags that mean nothing in a mode, where they were given.

    Raises:
        ConfigError: one was.
    """
    given = [n for n in names if context.get_parameter_source(n).name == "COMMANDLINE"]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{flags} means nothing with {mode}", fix="leave it out")


def load_pipeline(
    base: str,
    device: torch.device,
    dtype: str | None = None,
    *,
    move: bool = True,
    variant: str | None = None,
    config: str | None = None,
) -> Any:
    """A whole diffusers pipeline, from safetensors only.

    Args:
        move: to the device; else it stays on the CPU for others to place.
        dtype: one of :data:`DTYPES`; None: float32 on a CPU, else float16.
        variant, config: as :func:`customize.base.load_pipeline.load_pipeline` takes them.

    Raises:
        ConfigError: an unknown dtype, or as :func:`customize.base.load_pipeline.load_pipeline`.
        PipelineError: it cannot be loaded.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"there is no dtype {dtype}", where="--dtype", fix=suggest_names(dtype, DTYPES)
        )
    import torch

    from customize.base.load_pipeline import load_pipeline
    from customize.families import family_of

    hide_loading_bars()
    name = dtype or ("float32" if device.type == "cpu" else "float16")
    pipe = load_pipeline(base, getattr(torch, name), variant=variant, config=config)
    if family_of(pipe.components).modular_only:
        raise PipelineError(
            "this command works with standard pipelines, and diffusers has this model as a "
            "modular one only",
            where=f"base: {base}",
            fix="use it in Python, with the lines of the concept's README.md",
        )
    return pipe.to(device) if move else pipe


def hide_loading_bars() -> None:
    """The libraries' bars for each of a pipeline's files come between the lines of a command."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def snippet(
    base: str, concepts: Sequence[str], triggers: Sequence[str], family: str, output: str
) -> str:
    """The Python lines that load concepts of a family, if any, and draw with them.

    Args:
        output: "images" or "frames", whatever the base draws.
    """
    from customize.concepts.io import model_card

    opening = model_card.base_loading_code(family, json.dumps(base))
    drawing = model_card.inference_code(family, "a photo of " + " and ".join(triggers), output)
    if not concepts:
        return "\n".join([*opening, drawing])
    arguments = [json.dumps(concept) for concept in concepts]
    loading = f"pipe.load_custom({', '.join(arguments)})"
    return "\n".join(["import customize", *opening, loading, drawing])


def indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def command_line() -> str:
    """The command as it was given, for files that say how they were made."""
    import shlex

    return shlex.join(["customize", *sys.argv[1:]])


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all, over what was there.

    Raises:
        StorageError: it cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what the system says on writing into a :class:`customize.errors.StorageError`."""
    try:
        yield
    except Exception as error:
        if system_errno(error) is None:
            raise
        raise storage_error(error, where) from error
