"""Arguments of ``customize generate``, validated before a model is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from customize.errors import ConfigError

_MAX_COUNT = 1_000_000


@dataclass(frozen=True)
class LoadArguments:
    """The base and the arguments of :func:`customize.load_custom`, as the flags give them.

    Raises:
        ConfigError: ``fuse`` is set without concepts.
    """

    base: str
    sources: tuple[str, ...]
    weights: str | None
    names: str | None
    merge: str
    fuse: bool
    library: str | None
    attention: str | None
    memory: str | None
    ignore: tuple[str, ...] = ()
    variant: str | None = None
    base_config: str | None = None

    def __post_init__(self) -> None:
        if self.fuse and not self.sources:
            raise ConfigError("--fuse needs a concept", where="--fuse", fix="name one")


@dataclass(frozen=True)
class GenerationPlan:
    """Prompts, seeds and sampling settings; None is the pipeline's default.

    Attributes:
        prompts: Prompts, each of which is generated with each seed.
        negative: Negative prompt.
        avoid: Comma-separated phrases whose directions are projected out, or "auto".
        steps: Sampling steps.
        guidance: Guidance scale.
        seed: Seed of the first image of each prompt.
        count: Images per prompt, with consecutive seeds.
        size: (width, height) in pixels.
        together: Whether each concept of a prompt acts on its own words and part of the image;
            None: the pipeline decides.
        save_masks: Whether these parts are saved.

    Raises:
        ConfigError: ``save_masks`` is set and ``together`` is False, a number is out of range, or a
            text is not valid Unicode.
    """

    prompts: tuple[str, ...]
    negative: str | None
    avoid: str | None
    steps: int | None
    guidance: float | None
    seed: int
    count: int
    size: tuple[int, int] | None
    together: bool | None = None
    save_masks: bool = False

    def __post_init__(self) -> None:
        if self.save_masks and self.together is False:
            raise ConfigError(
                "--save-masks needs the masks that --no-together leaves out",
                where="--save-masks",
                fix="leave one of them out",
            )
        if self.count > _MAX_COUNT:
            raise ConfigError(
                f"{self.count} images per prompt are too many",
                where="--count",
                fix=f"choose at most {_MAX_COUNT}",
            )
        if self.seed + self.count > 1 << 63:
            raise ConfigError(
                f"the seed {self.seed} exceeds 64 bits", where="--seed", fix="choose a smaller one"
            )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ConfigError(
                f"the guidance scale {self.guidance} is not finite",
                where="--guidance",
                fix="choose a number; 5 to 10 are usual",
            )
        for text in (*self.prompts, self.negative or "", self.avoid or ""):
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ConfigError(f"the prompt {text!r} is not UTF-8 text", fix="write it in UTF-8")

    @property
    def jobs(self) -> Iterator[tuple[str, int]]:
        """Each prompt with each seed."""
        return product(self.prompts, range(self.seed, self.seed + self.count))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse ``"512"`` or ``"768x512"`` to (width, height) in pixels.

    Raises:
        ConfigError: The text has neither form.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:[xX×]([1-9]\d{0,4}))?", text.strip())
    if match is None:
        raise ConfigError(
            f"invalid size {text!r}", where="--size", fix="write for example 512 or 768x512"
        )
    return int(match[1]), int(match[2] or match[1])
