"""The demo's scorecard: rates of each model and concept, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from customize.demo import experiment
from customize.demo.experiment import (
    BASE,
    LORA_ALONE,
    LORA_MERGED,
    NAMES,
    ORTHOGONAL_ALONE,
    ORTHOGONAL_MERGED,
    REFERENCES,
    DrawnImages,
)
from customize.demo.snippet import loading_snippet
from customize.evaluation import result_file, storybook_rates
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import Judges, judge_inputs

if TYPE_CHECKING:
    from rich.table import Table

Row = dict[str, Any]
RATES = ("identity", "prompt", "composition", "leak")
COLUMNS = (*RATES, "both_in_a_pair", "drift")
HEADINGS = ("model", "concept", *RATES, "both in a pair", "drift")


def score_models(judges: Judges, drawn: Mapping[str, DrawnImages]) -> dict[str, Any]:
    """Score the images of all models.

    Args:
        judges: Judges of the storybook.
        drawn: Model -> its images; includes the base model.

    Returns:
        "rows", one per model and concept and one per model over all concepts, and "figures", the
        headline numbers. Rates are in [0, 1].
    """
    examples = {name: bundled_concept(name) for name in NAMES}
    prototypes = {
        name: judges.prototype(judge_inputs(example.images())) for name, example in examples.items()
    }
    base_unrelated = drawn[BASE].unrelated
    rows: list[Row] = []
    for model, images in drawn.items():
        pairs = [
            storybook_rates.rate_pair(judges, pair, (prototypes[a], prototypes[b]))["both"]
            for (a, b), pair in images.pairs.items()
        ]
        drift = None
        if images.unrelated is not None and base_unrelated is not None:
            drift = storybook_rates.drift(base_unrelated, images.unrelated)
        rates: dict[str, list[storybook_rates.Rates]] = {}  # concept -> one per seed
        for name, concept_images in images.concepts.items():
            example, prompts = examples[name], storybook_rates.evaluation_prompts(f"<{name}>")
            rates[name] = [
                storybook_rates.rate_concept(
                    judges,
                    batch,
                    prompts,
                    prototypes[name],
                    example.identity.kind,
                    example.backgrounds,
                )
                for batch in concept_images.split(len(prompts))
            ]
            rows.append({"model": model, "concept": name} | _summarize_seeds(rates[name]))
        rows.append(
            {"model": model, "concept": "all"}
            | _summarize_seeds([_mean_rates(seed) for seed in zip(*rates.values(), strict=True)])
            | {"both_in_a_pair": sum(pairs) / len(pairs) if pairs else None, "drift": drift}
        )
    overall = {row["model"]: row for row in rows if row["concept"] == "all"}
    figures = {
        "identity_alone": overall[ORTHOGONAL_ALONE]["identity"],
        "identity_ordinary_alone": overall[LORA_ALONE]["identity"],
        "identity_merged": overall[ORTHOGONAL_MERGED]["identity"],
        "identity_ordinary_merged": overall[LORA_MERGED]["identity"],
        "prompt_merged": overall[ORTHOGONAL_MERGED]["prompt"],
        "prompt_ordinary_merged": overall[LORA_MERGED]["prompt"],
        "drift_merged": overall[ORTHOGONAL_MERGED]["drift"],
        "drift_ordinary_merged": overall[LORA_MERGED]["drift"],
    }
    if REFERENCES in overall:
        figures |= {f"{rate}_references": overall[REFERENCES][rate] for rate in RATES}
    return {"rows": rows, "figures": figures}


def _mean_rates(rates: Sequence[storybook_rates.Rates]) -> storybook_rates.Rates:
    columns = zip(*map(astuple, rates), strict=True)
    return storybook_rates.Rates(*(fmean(values) for values in columns))


def _summarize_seeds(seeds: Sequence[storybook_rates.Rates]) -> Row:
    """Mean and standard deviation over seeds; "both_in_a_pair" and "drift" are left empty."""
    row: Row = {}
    for key in RATES:
        values = [getattr(rates, key) for rates in seeds]
        row[key], row[f"{key}_sd"] = result_file.mean_and_spread(values)
    return row | {"both_in_a_pair": None, "drift": None}


def _format_cells(row: Row) -> list[str]:
    cells = []
    for key in COLUMNS:
        if row[key] is None:
            cells.append("")
        elif key == "drift":
            cells.append(f"{row[key]:.3f}")
        else:
            cells.append(result_file.format_percent(row[key], row.get(f"{key}_sd")))
    return cells


def terminal_table(card: Mapping[str, Any]) -> Table:
    """One line per model, at most 80 columns wide; concepts are in :func:`markdown_page`."""
    from rich.table import Table

    table = Table("model", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in (*RATES, "both", "drift"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in card["rows"]:
        if row["concept"] == "all":
            table.add_row(row["model"], *_format_cells(row))
    return table


def markdown_page(card: Mapping[str, Any], folder: Path) -> str:
    """The scorecard as Markdown, with a row per model and concept."""
    text = [
        "# Scorecard",
        "",
        f"Shares of images ± standard deviation over {len(experiment.SEEDS)} seeds (drift: one",
        "seed), scored by judges that no model here was trained against.",
        "",
        "- *identity*: the image shows the trained subject, not another one of its class.",
        "- *prompt*: requested attributes that the image shows.",
        "- *composition*: requested accessories that the subject wears.",
        "- *leak*: images with a background of the training images instead of the requested one.",
        "- *both in a pair*: images that show each of two concepts in its half.",
        "- *drift*: mean absolute change of images without a concept, 0 to 1.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * (len(HEADINGS) - 2),
        *(
            "| " + " | ".join([row["model"], row["concept"], *_format_cells(row)]) + " |"
            for row in card["rows"]
        ),
        "",
        "![images](grid.png)",
        "",
        "![crosstalk](crosstalk.png)",
        "",
        "```python",
        python_snippet(folder),
        "```",
        "",
    ]
    return "\n".join(text)


def python_snippet(folder: Path) -> str:
    """The Python lines that load the demo's concepts."""
    paths = [folder / "concepts" / name for name in NAMES]
    prompt = "a photo of <rex> wearing a hat on a beach"
    return loading_snippet(experiment.BASE_NAME, paths, prompt, "rex.png")
