"""``customize evaluate --storybook``: exact rates in the miniature world."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.base.device import choose_device
from customize.cli.command_support import (
    check_output_file,
    check_steps,
    command_line,
    console,
    load_pipeline,
    parse_weight_list,
    refuse_flags,
    write_json,
)
from customize.cli.sample_files import read_samples
from customize.errors import ConceptError, ConfigError
from customize.evaluation import result_file
from customize.near_names import suggest_names

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.tokens.subjects import Subject
    from customize.concepts.types import Adaptation
    from customize.storybook.judges import Judges

RATES = ("identity", "prompt", "composition", "leak", "drift")
SIDE = 64  # of the storybook's pictures


def check_mode(context: Any, storybook: bool, images: Path | None, concepts: Sequence[str]) -> None:
    """Refuse a call that is for neither mode, or has flags of the other.

    Raises:
        ConfigError: that, in words.
    """
    if storybook == (images is not None):
        raise ConfigError(
            "evaluate needs one of --storybook and --images",
            fix="give --storybook with concepts, or --images with a folder of pictures",
        )
    if storybook:
        refuse_flags(
            context, ("prompts", "class_word", "clip", "dino", "blip", "blip2"), "--storybook"
        )
        return
    if concepts:
        raise ConfigError("--images scores pictures, not concepts", fix="leave concepts out")
    storybook_only = ("base", "variant", "base_config", "judges", "weights", "merge")
    refuse_flags(context, (*storybook_only, "seeds", "steps"), "--images")


def run_storybook(
    sources: Sequence[str],
    *,
    base: str,
    variant: str | None,
    base_config: str | None,
    judges: Path,
    references: Path,
    weights: str | None,
    merge: str,
    seeds: int,
    steps: int,
    device: str | None,
    json_file: Path | None,
) -> None:
    """Score each concept alone and, where there are several, all of them merged."""
    if not sources:
        raise ConfigError(
            "there is no concept to score", fix="name at least one, such as demo/concepts/rex"
        )
    numbers = parse_weight_list(weights, len(sources)) or [1.0] * len(sources)
    check_output_file(json_file)
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.tokens.subjects import check_subjects
    from customize.storybook.judges import load_judges

    concepts = [_concept(source) for source in sources]
    check_compatible(concepts)
    loaded = load_judges(judges)
    subjects = [subject for concept in concepts for subject in _subjects(concept)]
    check_subjects(subjects)
    known = {each.name: _known(loaded, each, references, len(subjects)) for each in subjects}
    pipe = load_pipeline(
        base, choose_device(device, "--device"), "float32", variant=variant, config=base_config
    )
    _check_pipeline(pipe, base, concepts, steps)
    rows = storybook_rows(
        pipe,
        loaded,
        concepts,
        numbers,
        known,
        seeds=range(1, seeds + 1),
        steps=steps,
        merge=merge,
    )
    _print_rates(rows)
    if json_file is not None:
        write_json(
            json_file,
            result_file.make_result("evaluate", command_line(), rows, storybook_figures(rows)),
        )


def _concept(source: str) -> Adaptation:
    """A concept or a merge of such; of a LoRA it is not known what pictures of it should show.

    Raises:
        ConceptError: it cannot be read, or is a LoRA.
    """
    from customize.concepts.formats.open_adaptation import open_adaptation
    from customize.concepts.types import Concept, Lora

    found = open_adaptation(source)
    if isinstance(found, Concept) or (isinstance(found, Lora) and found.subjects):
        return found
    raise ConceptError(
        "this is an ordinary LoRA, and the storybook's prompts and judges ask for a concept by its "
        "trigger and its class",
        where=source,
        fix="draw with customize generate, and score the pictures with customize evaluate --images",
    )


def _subjects(concept: Adaptation) -> Sequence[Subject]:
    """What is scored: a concept, also where a plain word calls it, or each concept of a merge."""
    from customize.concepts.tokens.subjects import Subject

    info = concept.info
    return concept.subjects or [Subject(info.name, info.trigger, info.class_word, {})]


def _check_pipeline(pipe: Any, base: str, concepts: Sequence[Adaptation], steps: int) -> None:
    """Refuse what would fail only after pictures were drawn."""
    from customize.families import family_of
    from customize.pipeline.validation import check_base

    family = family_of(pipe.components)
    side = family.default_resolution
    if side != SIDE:
        raise ConfigError(
            f"the base draws pictures of {side} x {side} pixels, and the storybook has {SIDE} x "
            f"{SIDE}",
            where=f"--base {base}",
            fix="leave it out, or name a base that the storybook was trained into",
        )
    check_steps(pipe, steps)
    check_base(family, concepts)


def storybook_rows(
    pipe: Any,
    judges: Judges,
    concepts: Sequence[Adaptation],
    weights: Sequence[float],
    known: Mapping[str, tuple[Tensor, set[str]]],
    *,
    seeds: Sequence[int],
    steps: int,
    merge: str = "auto",
) -> list[dict[str, Any]]:
    """One row for each concept, seed, and number of concepts attached (1, and all of them).

    Those of a merge are never alone.

    Args:
        weights: of the concepts where all are attached; alone each has 1.
        known: subject's name -> its signature, and what its references show and must not leak.
    """
    from rich.progress import Progress

    from customize import load_custom, unload_custom
    from customize.demo import unrelated_prompts
    from customize.evaluation.storybook_rates import (
        draw_groups,
        drift,
        evaluation_prompts,
        rate_concept,
    )

    pipe.set_progress_bar_config(disable=True)
    plain = unrelated_prompts()
    setups = [([concept], [1.0]) for concept in concepts]
    if len(concepts) > 1:
        setups.append((list(concepts), list(weights)))
    of_setup = [
        {
            "": plain,
            **{s.name: evaluation_prompts(s.trigger) for c in together for s in _subjects(c)},
        }
        for together, _ in setups
    ]
    rows = []
    err = console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        pictures = len(plain) + sum(len(own) for groups in of_setup for own in groups.values())
        task = progress.add_task("Drawing", total=pictures * len(seeds))

        def drawn(groups: Mapping[str, Sequence[str]], seed: int) -> dict[str, Tensor]:
            return draw_groups(
                pipe, groups, seed, lambda count: progress.advance(task, count), steps
            )

        before = {seed: drawn({"": plain}, seed)[""] for seed in seeds}
        for (together, factors), groups in zip(setups, of_setup, strict=True):
            load_custom(pipe, *together, weights=factors, merge=merge)
            for seed in seeds:
                images = drawn(groups, seed)
                change = drift(before[seed], images[""])
                subjects = [subject for concept in together for subject in _subjects(concept)]
                for subject in subjects:
                    name = subject.name
                    signature, shown = known[name]
                    rates = rate_concept(
                        judges,
                        images[name],
                        groups[name],
                        signature,
                        subject.class_word,
                        shown,
                    )
                    rows.append(
                        {
                            "concept": name,
                            "attached": len(subjects),
                            "seed": seed,
                            "identity": rates.identity,
                            "prompt": rates.prompt,
                            "composition": rates.composition,
                            "leak": rates.leak,
                            "distance": rates.distance,
                            "drift": change,
                        }
                    )
            unload_custom(pipe)
    return rows


def storybook_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over concepts and seeds: ``identity_alone``, ``identity_merged`` and so on."""
    figures = {}
    for suffix, alone in (("alone", True), ("merged", False)):
        chosen = [row for row in rows if (row["attached"] == 1) == alone]
        for rate in RATES:
            if chosen:
                figures[f"{rate}_{suffix}"] = result_file.mean_and_spread(
                    [row[rate] for row in chosen]
                )[0]
    return figures


def _known(
    judges: Judges, subject: Subject, references: Path, count: int
) -> tuple[Tensor, set[str]]:
    """A concept's signature by the judges, and the places that its references show."""
    from customize.storybook.caption_grammar import parse_prompt
    from customize.storybook.judges import judge_inputs
    from customize.storybook.world import CLASSES

    if subject.class_word not in CLASSES:
        raise ConceptError(
            f"{subject.name} is a {subject.class_word}, which the storybook does not have",
            where=subject.name,
            fix=suggest_names(subject.class_word, CLASSES),
        )
    folder = references / subject.name
    if count == 1 and not os.path.isdir(folder):
        folder = references
    samples = read_samples(folder)
    images = judge_inputs([sample.image for sample in samples])
    shown = set()
    for sample, seen in zip(samples, judges.predict_attributes(images), strict=True):
        shown.add(parse_prompt(sample.caption).place or seen["place"])
    return judges.prototype(images), shown


def _print_rates(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Column, Table

    table = Table("concept", "attached", *(Column(rate, overflow="fold") for rate in RATES))
    for name, attached in dict.fromkeys((row["concept"], row["attached"]) for row in rows):
        own = [row for row in rows if (row["concept"], row["attached"]) == (name, attached)]
        cells = []
        for rate in RATES[:-1]:
            cells.append(
                result_file.format_percent(*result_file.mean_and_spread([row[rate] for row in own]))
            )
        found = result_file.mean_and_spread([row["drift"] for row in own])
        cells.append(" ±".join(f"{x:.3f}".lstrip("0") for x in found if x is not None))
        table.add_row(name, "alone" if attached == 1 else f"all {attached}", *cells)
    out = console()
    out.print(table)
    count = len({row["seed"] for row in rows})
    out.print(
        f"Shares, mean ± standard deviation over {count} seeds. Of leak and drift less is better,"
        " of the others more.",
        soft_wrap=True,
    )
