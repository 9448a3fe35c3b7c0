"""``customize evaluate --storybook``: exact rates in the miniature world."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.base.device import choose_device
from customize.base.standard_pipeline import check_steps
from customize.cli.base_pipeline import load_base_pipeline
from customize.cli.concept_flags import parse_weight_list
from customize.cli.output_files import check_output_file, write_json
from customize.cli.sample_files import read_samples
from customize.cli.terminal import command_line, console
from customize.errors import ConceptError, ConfigError
from customize.evaluation import result_file
from customize.near_names import suggest_names

if TYPE_CHECKING:
    from torch import Tensor

    from customize.concepts.tokens.subjects import Subject
    from customize.concepts.types import Adaptation
    from customize.storybook.judges import Judges

RATES = ("identity", "prompt", "composition", "leak", "drift")
IMAGE_SIZE = 64  # pixels, of the storybook


def evaluate_storybook(
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
    """Score each concept alone and, if there are several, all of them merged."""
    if not sources:
        raise ConfigError(
            "no concept is given", fix="name at least one, for example demo/concepts/rex"
        )
    factors = parse_weight_list(weights, len(sources))
    check_output_file(json_file)
    from customize.concepts.merge.compatibility import check_compatible
    from customize.concepts.tokens.subjects import check_subjects
    from customize.storybook.judges import load_judges

    concepts = [_open_concept(source) for source in sources]
    check_compatible(concepts)
    loaded_judges = load_judges(judges)
    subjects = [subject for concept in concepts for subject in _subjects(concept)]
    check_subjects(subjects)
    reference_data = {
        subject.name: _read_references(loaded_judges, subject, references, len(subjects))
        for subject in subjects
    }
    torch_device = choose_device(device, "--device")
    pipe = load_base_pipeline(base, torch_device, "float32", variant=variant, config=base_config)
    _check_pipeline(pipe, base, concepts, steps)
    rows = storybook_rows(
        pipe,
        loaded_judges,
        concepts,
        factors,
        reference_data,
        seeds=range(1, seeds + 1),
        steps=steps,
        merge=merge,
    )
    _print_rates(rows)
    if json_file is not None:
        figures = storybook_figures(rows)
        write_json(json_file, result_file.make_result("evaluate", command_line(), rows, figures))


def _open_concept(source: str) -> Adaptation:
    """Open a concept or a merge of concepts.

    Raises:
        ConceptError: It cannot be read, or is a LoRA, for which the expected content is unknown.
    """
    from customize.concepts.formats.open_adaptation import open_adaptation
    from customize.concepts.types import Concept, Lora

    adaptation = open_adaptation(source)
    if isinstance(adaptation, Concept) or (isinstance(adaptation, Lora) and adaptation.subjects):
        return adaptation
    raise ConceptError(
        "a LoRA has neither the trigger nor the class word that the storybook's prompts need",
        where=source,
        fix="generate images with customize generate, and score them with customize evaluate "
        "--images",
    )


def _subjects(concept: Adaptation) -> Sequence[Subject]:
    """The concept itself, or each concept of a merge."""
    from customize.concepts.tokens.subjects import Subject

    info = concept.info
    return concept.subjects or [Subject(info.name, info.trigger, info.class_word, {})]


def _check_pipeline(pipe: Any, base: str, concepts: Sequence[Adaptation], steps: int) -> None:
    """Refuse a base before images are generated."""
    from customize.families import family_of
    from customize.pipeline.validation import check_base

    family = family_of(pipe.components)
    size = family.default_resolution
    if size != IMAGE_SIZE:
        raise ConfigError(
            f"the base generates {size} x {size} pixels, the storybook {IMAGE_SIZE} x {IMAGE_SIZE}",
            where=f"--base {base}",
            fix="remove the flag, or name a base trained by scripts/train_storybook.py",
        )
    check_steps(pipe, steps)
    check_base(family, concepts)


def storybook_rows(
    pipe: Any,
    judges: Judges,
    concepts: Sequence[Adaptation],
    weights: Sequence[float],
    references: Mapping[str, tuple[Tensor, set[str]]],
    *,
    seeds: Sequence[int],
    steps: int,
    merge: str = "auto",
) -> list[dict[str, Any]]:
    """Generate and score images of each concept alone, then of all merged.

    Args:
        pipe: Pipeline of the bundled base.
        judges: Judges of the storybook.
        concepts: Concepts, or merges of them, which are scored merged only.
        weights: Weights of the concepts in the merge; alone, each has weight 1.
        references: Subject's name -> its prototype (64,), and the places in its reference images,
            which must not leak.
        seeds: Seeds, each of which scores all prompts once.
        steps: Sampling steps.
        merge: Name of the merge method.

    Returns:
        A row for each subject, seed, and number of concepts attached.
    """
    from rich.progress import Progress

    from customize import load_custom, unload_custom
    from customize.evaluation.storybook_rates import (
        draw_groups,
        drift,
        evaluation_prompts,
        rate_concept,
        unrelated_prompts,
    )

    pipe.set_progress_bar_config(disable=True)
    unrelated = unrelated_prompts()
    setups = [([concept], [1.0]) for concept in concepts]
    if len(concepts) > 1:
        setups.append((list(concepts), list(weights)))
    setup_prompts = [
        {
            "": unrelated,
            **{s.name: evaluation_prompts(s.trigger) for c in attached for s in _subjects(c)},
        }
        for attached, _ in setups
    ]
    rows = []
    err = console(stderr=True)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as progress:
        count = len(unrelated) + sum(
            len(prompts) for groups in setup_prompts for prompts in groups.values()
        )
        task = progress.add_task("Generating", total=count * len(seeds))

        def draw(groups: Mapping[str, Sequence[str]], seed: int) -> dict[str, Tensor]:
            return draw_groups(
                pipe, groups, seed, lambda drawn: progress.advance(task, drawn), steps
            )

        before = {seed: draw({"": unrelated}, seed)[""] for seed in seeds}
        for (attached, factors), groups in zip(setups, setup_prompts, strict=True):
            load_custom(pipe, *attached, weights=factors, merge=merge)
            for seed in seeds:
                images = draw(groups, seed)
                unrelated_drift = drift(before[seed], images[""])
                subjects = [subject for concept in attached for subject in _subjects(concept)]
                for subject in subjects:
                    prototype, reference_places = references[subject.name]
                    rates = rate_concept(
                        judges,
                        images[subject.name],
                        groups[subject.name],
                        prototype,
                        subject.class_word,
                        reference_places,
                    )
                    rows.append(
                        {
                            "concept": subject.name,
                            "attached": len(subjects),
                            "seed": seed,
                            "identity": rates.identity,
                            "prompt": rates.prompt,
                            "composition": rates.composition,
                            "leak": rates.leak,
                            "distance": rates.distance,
                            "drift": unrelated_drift,
                        }
                    )
            unload_custom(pipe)
    return rows


def storybook_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return means over concepts and seeds, such as ``identity_alone`` and ``identity_merged``."""
    figures = {}
    for suffix, alone in (("alone", True), ("merged", False)):
        selected = [row for row in rows if (row["attached"] == 1) == alone]
        for rate in RATES:
            if selected:
                values = [row[rate] for row in selected]
                figures[f"{rate}_{suffix}"] = result_file.mean_and_spread(values)[0]
    return figures


def _read_references(
    judges: Judges, subject: Subject, references: Path, count: int
) -> tuple[Tensor, set[str]]:
    """Return the prototype of a subject's reference images, and the places that they show."""
    from customize.storybook.caption_grammar import parse_prompt
    from customize.storybook.judges import judge_inputs
    from customize.storybook.world import CLASSES

    if subject.class_word not in CLASSES:
        raise ConceptError(
            f"{subject.name} has the class word {subject.class_word}, and the storybook has no "
            "such class",
            where=subject.name,
            fix=suggest_names(subject.class_word, CLASSES),
        )
    folder = references / subject.name
    if count == 1 and not os.path.isdir(folder):
        folder = references
    samples = read_samples(folder)
    images = judge_inputs([sample.image for sample in samples])
    attributes = judges.predict_attributes(images)
    reference_places = {
        parse_prompt(sample.caption).background or predicted["place"]
        for sample, predicted in zip(samples, attributes, strict=True)
    }
    return judges.prototype(images), reference_places


def _print_rates(rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Column, Table

    table = Table(
        "concept", "attached", *(Column(rate, justify="right", no_wrap=True) for rate in RATES)
    )
    for name, attached in dict.fromkeys((row["concept"], row["attached"]) for row in rows):
        group = [row for row in rows if (row["concept"], row["attached"]) == (name, attached)]
        cells = [
            result_file.format_percent(*result_file.mean_and_spread([row[rate] for row in group]))
            for rate in RATES[:-1]
        ]
        mean, deviation = result_file.mean_and_spread([row["drift"] for row in group])
        numbers = [mean] if deviation is None else [mean, deviation]
        cells.append(" ±".join(f"{number:.3f}".lstrip("0") for number in numbers))
        table.add_row(name, "alone" if attached == 1 else f"all {attached}", *cells)
    console().print(table)
    console().print(
        f"Mean ± standard deviation over {len({row['seed'] for row in rows})} seeds. Lower is"
        " better for leak and drift, higher for the others."
    )
