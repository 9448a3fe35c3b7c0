"""``customize generate``: pictures, each with a JSON file of how it was made."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.base.device import choose_device
from customize.cli.command_support import (
    check_steps,
    console,
    load_pipeline,
    rename_concepts,
    storage_errors,
)
from customize.cli.region_arguments import check_regions
from customize.cli.weight_arguments import parse_weights
from customize.cli.write_image import generate_image, next_free_number, save_image
from customize.errors import ConfigError
from customize.evaluation import result_file

if TYPE_CHECKING:
    import torch

    from customize.cli.weight_arguments import Given
    from customize.concepts.formats.lora_file import LoraFile
    from customize.concepts.types import Adaptation
    from customize.families import Family

_MOST = 1_000_000  # pictures a prompt


@dataclass(frozen=True)
class LoadArguments:
    """With what to draw, as the flags have it; see :func:`customize.load_custom`."""

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
            raise ConfigError(
                "there is no concept to put into the weights", where="--fuse", fix="name one"
            )


@dataclass(frozen=True)
class GenerationPlan:
    """What to draw: each prompt with each seed. None stands for the pipeline's own default.

    Attributes:
        avoid: what prompts, and what concepts add to them, are cleaned of.
        seed: of the first picture of each prompt; from there they count up.
        count: pictures a prompt.
        size: (width, height) in pixels.

    Raises:
        ConfigError: a number is beyond what can be drawn with, or a prompt is no text.
    """

    prompts: tuple[str, ...]
    negative: str | None
    avoid: str | None
    steps: int | None
    guidance: float | None
    seed: int
    count: int
    size: tuple[int, int] | None

    def __post_init__(self) -> None:
        if self.count > _MOST:
            raise ConfigError(
                f"{self.count} pictures of a prompt are too many",
                where="--count",
                fix=f"choose at most {_MOST}",
            )
        if self.seed + self.count > 1 << 63:
            raise ConfigError(
                f"the seed {self.seed} is beyond 64 bits",
                where="--seed",
                fix="choose a smaller one",
            )
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ConfigError(
                f"the guidance {self.guidance} is not finite",
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
    """``"512"`` or ``"768x512"`` as (width, height).

    Raises:
        ConfigError: it is neither.
    """
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:[xX×]([1-9]\d{0,4}))?", text.strip())
    if match is None:
        raise ConfigError(
            f"{text!r} is not a size", where="--size", fix="write it such as 512 or 768x512"
        )
    return int(match[1]), int(match[2] or match[1])


def run(
    loading: LoadArguments,
    plan: GenerationPlan,
    regions: Mapping[str, Any],
    output: Path,
    device: str | None,
    dtype: str | None,
) -> None:
    """Draw everything of a plan into a folder.

    Args:
        regions: as :func:`customize.cli.region_arguments.parse_regions` gives them.
    """
    from rich.progress import track

    from customize.concepts.formats.open_adaptation import open_adaptations
    from customize.concepts.io.output_folder import check_writable
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.types import Concept
    from customize.families import family_of

    weights = parse_weights(loading.weights, len(loading.sources))
    concepts = rename_concepts(open_adaptations(loading.sources, loading.ignore), loading.names)
    ours = [concept for concept in concepts if isinstance(concept, Concept)]
    if ours:
        check_compatible(ours)
    check_regions(plan.prompts, regions, {c.info.name: c.info.trigger_words for c in concepts})
    check_writable(output)
    place = choose_device(device, "--device")
    if loading.memory is not None and device is not None:
        _check_placed(place, device)
    pipe = load_pipeline(
        loading.base,
        place,
        dtype,
        move=loading.memory is None,
        variant=loading.variant,
        config=loading.base_config,
    )
    family = family_of(pipe.components, pipe.config)
    for side in plan.size or ():
        if side % family.latent_multiple:
            raise ConfigError(
                f"{side} pixels are not a multiple of {family.latent_multiple}",
                where="--size",
                fix=f"choose multiples of {family.latent_multiple}",
            )
    check_steps(pipe, plan.steps)
    guided, scale = _guided(pipe, family, plan)
    _load(pipe, concepts, weights, plan.avoid, loading)
    if loading.library is None:  # which refuses unknown triggers itself
        _check_prompts(pipe, plan.prompts, concepts)
    if loading.memory is not None:
        console(stderr=True).print(f"memory: {pipe.custom.memory}", markup=False, soft_wrap=True)
    pipe.set_progress_bar_config(disable=True)
    drawn_with = {
        "base": loading.base,
        "fuse": loading.fuse,
        "library": loading.library,
        "attention": loading.attention,
        "memory": loading.memory,
        "regions": {words: _shown(region) for words, region in regions.items()},
        "versions": result_file.versions(),
    }
    sources = {c.info.name: s for c, s in zip(concepts, loading.sources, strict=True)}
    total = len(plan.prompts) * plan.count
    with storage_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    number = next_free_number(output)
    numbers = []
    err = console(stderr=True)
    for prompt, seed in track(
        plan.jobs,
        "Drawing",
        total,
        console=err,
        transient=True,
        disable=not err.is_terminal,
    ):
        given = {**guided, **({"regions": dict(regions)} if regions else {})}
        image, settings = generate_image(pipe, prompt, seed, plan, given, family.output)
        facts = {"guidance": scale, **drawn_with, **_attached(pipe, sources)}
        numbers.append(save_image(output, number, image, settings | facts))
        number = numbers[-1] + 1
    console().print(f"{_named(numbers)} in {output}", markup=False, soft_wrap=True)


def _named(numbers: Sequence[int]) -> str:
    """The pictures of these numbers, in words."""
    first, last = f"{numbers[0]:04}.png", f"{numbers[-1]:04}.png"
    if len(numbers) == 1:
        return f"{first} is"
    # Another process that draws into the folder has taken the others.
    among = "" if numbers[-1] - numbers[0] < len(numbers) else f"{len(numbers)} of "
    return f"{among}{first} to {last} are"


def _check_placed(chosen: torch.device, flag: str) -> None:
    """Refuse another device than the one that a memory plan puts models on."""
    import torch

    there = torch.device("cpu")
    if torch.accelerator.is_available():
        there = torch.accelerator.current_accelerator() or there
    same = chosen.type == there.type and chosen.index in (None, there.index or 0)
    if not same:
        raise ConfigError(
            f"--memory places the models itself, on the device {there}",
            where=f"--device {flag}",
            fix="leave one of the two out",
        )


def _load(
    pipe: Any,
    concepts: Sequence[Adaptation | LoraFile],
    weights: Given,
    avoid: str | None,
    loading: LoadArguments,
) -> None:
    from customize import Decor, load_custom

    cleaned = [] if avoid is None else [Decor(avoid=avoid)]
    asked: dict[str, Any] = {
        "library": loading.library,
        "attention": loading.attention,
        "memory": loading.memory,
    }
    if concepts:
        asked |= {"weights": weights, "fuse": loading.fuse}
    if concepts or loading.library is not None:
        asked["merge"] = loading.merge
    if concepts or cleaned or any(value is not None for value in asked.values()):
        load_custom(pipe, *concepts, *cleaned, **asked)


def _attached(pipe: Any, sources: Mapping[str, str]) -> dict[str, Any]:
    """What is attached at the time of a picture: those that were named, and a library's."""
    from customize.pipeline.sources import get_family
    from customize.pipeline.state import get_state

    attached = get_state(get_family(pipe)).attached.values()
    weights = {row.name: row.weight for row in pipe.custom.rows}
    shown = {n: w if isinstance(w, float) else f"{w}" for n, w in weights.items()}
    return {
        "merge": pipe.custom.merge if len(attached) > 1 else None,
        "concepts": [
            {
                "name": each.name,
                "trigger": each.concept.info.trigger,
                "class_word": each.concept.info.class_word,
                "subjects": {s.trigger: s.class_word for s in each.concept.subjects},
                "weight": shown[each.name],
                "source": sources.get(each.name) or str(each.concept.source),
            }
            for each in attached
        ],
    }


def _shown(region: Any) -> Any:
    """A box, or how large a mask is."""
    return list(region) if isinstance(region, tuple) else f"mask of {region.width}x{region.height}"


def _guided(pipe: Any, family: Family, plan: GenerationPlan) -> tuple[dict[str, Any], float | None]:
    """The call's arguments for guidance and negative prompt, and the scale that takes effect; None
    where the pipeline is not guided by itself.

    Raises:
        ConfigError: the pipeline has no such argument, or would ignore what it is given.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    asked = family.guidance_kwargs(plan.guidance, plan.negative)
    for name in asked:
        if name not in taken:
            raise ConfigError(
                f"the base's {type(pipe).__name__} takes no {name}",
                where="--negative" if name == "negative_prompt" else "--guidance",
                fix="leave it out",
            )
    default = taken[family.guidance_argument].default
    scale, none = float(asked.get(family.guidance_argument, default)), family.no_guidance
    if family.is_guided(scale):
        without = family.guidance_needs_negative_prompt and "negative_prompt" not in asked
        return asked, None if without else scale
    if plan.guidance is not None and scale > none and not family.has_guidance_input:
        raise ConfigError(
            "the base was distilled to draw without guidance, and ignores it",
            where="--guidance",
            fix="leave it out",
        )
    if plan.negative is not None:
        raise ConfigError(
            f"at guidance {scale:g} the base reads no negative prompt",
            where="--negative",
            fix=f"give --guidance above {none:g} with it, or leave it out"
            if family.is_guided(none + 1.0)
            else "leave it out",
        )
    return asked, scale


def _check_prompts(
    pipe: Any, prompts: Sequence[str], concepts: Sequence[Adaptation | LoraFile]
) -> None:
    """Say on stderr what is most likely a slip: a trigger that nothing brings, or none used.

    The base may have tokens of its own, as one that concepts were merged into.
    """
    from customize.concepts.tokens.token_rows import known_tokens
    from customize.families import family_of
    from customize.pipeline.state import get_tokenizers

    err = console(stderr=True)
    triggers = [trigger for concept in concepts for trigger in concept.info.triggers]
    # LoRAs without a trigger are for every prompt.
    some_have_none = any(not concept.info.triggers for concept in concepts)
    tokenizers = get_tokenizers(family_of(pipe.components, pipe.config)).values()
    for prompt in prompts:
        unknown = [
            word
            for word in re.findall(r"<[a-z0-9_-]+>", prompt)
            if word not in triggers and not any(known_tokens(each, [word]) for each in tokenizers)
        ]
        if unknown:
            if not concepts:  # the call warns of those that attached concepts lack
                err.print(
                    f"note: no concept is given, so {', '.join(unknown)} calls none",
                    markup=False,
                    soft_wrap=True,
                )
        elif triggers and not some_have_none and not any(trigger in prompt for trigger in triggers):
            err.print(
                f"note: {prompt!r} names none of {', '.join(triggers)}",
                markup=False,
                soft_wrap=True,
            )
