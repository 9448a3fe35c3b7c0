"""What the demo leaves behind: the scorecard, the picture grid, and the crosstalk heat map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from customize import demo
from customize.concepts.adapter import flatten_layers
from customize.core import crosstalk
from customize.errors import storage_error
from customize.evaluation import result_file, storybook_rates
from customize.image_tensors import tensor_to_images
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import Judges, judge_inputs

if TYPE_CHECKING:
    from rich.table import Table

    from customize.concepts.types import Concept

Row = dict[str, Any]
RATES = ("identity", "prompt", "composition", "leak")
COLUMNS = (*RATES, "both_in_a_pair")


def score(judges: Judges, drawn: Mapping[str, demo.DrawnImages]) -> dict[str, Any]:
    """One row a model and concept, and the headline figures; rates in [0, 1]."""
    stories = {name: bundled_concept(name) for name in demo.NAMES}
    signatures = {n: judges.prototype(judge_inputs(s.pictures())) for n, s in stories.items()}
    before = drawn[demo.BASE].unrelated
    rows: list[Row] = []
    for model, pictures in drawn.items():
        pairs = [
            storybook_rates.rate_pair(judges, images, (signatures[a], signatures[b]))["both"]
            for (a, b), images in pictures.pairs.items()
        ]
        changed = None
        if pictures.unrelated is not None and before is not None:
            changed = storybook_rates.drift(before, pictures.unrelated)
        # By concept and seed.
        found: dict[str, list[storybook_rates.Rates]] = {}
        for name, images in pictures.concepts.items():
            story, prompts = stories[name], storybook_rates.evaluation_prompts(f"<{name}>")
            found[name] = [
                storybook_rates.rate_concept(
                    judges, some, prompts, signatures[name], story.identity.kind, story.places
                )
                for some in images.split(len(prompts))
            ]
            rows.append({"model": model, "concept": name} | _rates(found[name]))
        rows.append(
            {"model": model, "concept": "all"}
            | _rates([_over(seed) for seed in zip(*found.values(), strict=True)])
            | {"both_in_a_pair": sum(pairs) / len(pairs) if pairs else None, "drift": changed}
        )
    alls = {row["model"]: row for row in rows if row["concept"] == "all"}
    figures = {
        "identity_alone": alls[demo.ORTHOGONAL_ALONE]["identity"],
        "identity_ordinary_alone": alls[demo.LORA_ALONE]["identity"],
        "identity_merged": alls[demo.ORTHOGONAL_MERGED]["identity"],
        "identity_ordinary_merged": alls[demo.LORA_MERGED]["identity"],
        "prompt_merged": alls[demo.ORTHOGONAL_MERGED]["prompt"],
        "prompt_ordinary_merged": alls[demo.LORA_MERGED]["prompt"],
        "drift_merged": alls[demo.ORTHOGONAL_MERGED]["drift"],
        "drift_ordinary_merged": alls[demo.LORA_MERGED]["drift"],
    }
    return {"rows": rows, "figures": figures}


def _over(rates: Sequence[storybook_rates.Rates]) -> storybook_rates.Rates:
    """The mean over concepts."""
    return storybook_rates.Rates(
        *(fmean(values) for values in zip(*map(astuple, rates), strict=True))
    )


def _rates(seeds: Sequence[storybook_rates.Rates]) -> Row:
    """Mean and standard deviation over seeds; what only pairs or other prompts tell is left out."""
    row: Row = {}
    for key in RATES:
        row[key], row[f"{key}_sd"] = result_file.mean_and_spread([getattr(r, key) for r in seeds])
    return row | {"both_in_a_pair": None, "drift": None}


def _lines(card: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            row["model"],
            row["concept"],
            *(
                "" if row[k] is None else result_file.format_percent(row[k], row.get(f"{k}_sd"))
                for k in COLUMNS
            ),
            "" if row["drift"] is None else f"{row['drift']:.3f}",
        ]
        for row in card["rows"]
    ]


HEADINGS = ("model", "concept", *RATES, "both in a pair", "drift")


def table(card: Mapping[str, Any]) -> Table:
    """The scorecard for a terminal."""
    from rich.table import Table

    shown = Table(
        title="Scorecard (shares of pictures ± standard deviation over seeds; drift: mean change of"
        " unrelated pictures)"
    )
    for index, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="left" if index < 2 else "right", overflow="fold")
    for line in _lines(card):
        shown.add_row(
            *line, style="bold" if line[1] == "all" else None, end_section=line[1] == "all"
        )
    return shown


def markdown(card: Mapping[str, Any], folder: Path) -> str:
    """The scorecard as a page."""
    text = [
        "# Scorecard",
        "",
        f"Shares of pictures ± standard deviation over {len(demo.SEEDS)} seeds (pairs and drift:",
        "one seed), judged by nets that no model here was trained against. *identity*: it is that",
        "very dog, not some dog. *prompt*: what was asked is shown. *composition*: it wears the",
        "accessory that was asked for. *leak*: a place of the training pictures came along",
        "unasked. *both in a pair*: each of two concepts is in its half. *drift*: mean change of",
        "pictures that name no concept, 0 to 1.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|---|---|" + "---:|" * (len(HEADINGS) - 2),
        *("| " + " | ".join(line) + " |" for line in _lines(card)),
        "",
        "![pictures](grid.png)",
        "",
        "![crosstalk](crosstalk.png)",
        "",
        "```python",
        snippet(folder),
        "```",
        "",
    ]
    return "\n".join(text)


def snippet(folder: Path) -> str:
    """The Python lines that load what the demo learned."""
    paths = ",\n    ".join(f'"{(folder / "concepts" / n).as_posix()}"' for n in demo.NAMES)
    return "\n".join(
        [
            "import customize",
            "from diffusers import DiffusionPipeline",
            "",
            'pipe = DiffusionPipeline.from_pretrained("assets/storybook").load_custom(',
            f"    {paths},",
            ")",
            'pipe("a photo of <rex> wearing a hat on a beach").images[0].save("rex.png")',
        ]
    )


SIDE, MARGIN, LABEL = 80, 4, 150


def _paste(sheet: Image.Image, picture: Tensor, column: int, top: int) -> None:
    (image,) = tensor_to_images(picture[None])
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    sheet.paste(small, (LABEL + column * (SIDE + MARGIN), top))


def grid(drawn: Mapping[str, demo.DrawnImages], shown: int = 4) -> Image.Image:
    """All models on the same prompts: `shown` pictures a concept, two a pair, one row a model."""
    font = ImageFont.load_default(size=13)
    columns = len(demo.NAMES) * shown + 2 * len(demo.PAIRS)
    width = LABEL + columns * (SIDE + MARGIN)
    heads = 64
    rows = [
        demo.ORTHOGONAL_ALONE,
        demo.ORTHOGONAL_MERGED,
        demo.BASE,
        demo.LORA_ALONE,
        demo.LORA_MERGED,
    ]
    sheet = Image.new("RGB", (width, SIDE + 40 + heads + len(rows) * (SIDE + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((6, 30 + SIDE / 2 - 14), "five pictures\nto learn from", "black", font)
    for index, name in enumerate(demo.NAMES):
        references = judge_inputs(bundled_concept(name).pictures())
        pen.text((LABEL + index * 6 * (SIDE + MARGIN), 4), f"<{name}>", "black", font)
        for k, picture in enumerate(references):
            _paste(sheet, picture, index * 6 + k, 24)
    top = SIDE + 36
    prompts = {n: storybook_rates.evaluation_prompts(f"<{n}>")[:shown] for n in demo.NAMES}
    pairs = {p: demo.pair_prompts((f"<{p[0]}>", f"<{p[1]}>")) for p in demo.PAIRS}
    asked = [p for some in (*prompts.values(), *pairs.values()) for p in some]
    for column, prompt in enumerate(asked):
        short = prompt.removeprefix("a photo of ").replace("wearing ", "")
        pen.multiline_text(
            (LABEL + column * (SIDE + MARGIN), top), _wrapped(short, font), "black", font, spacing=1
        )
    for k, model in enumerate(rows):
        y = top + heads + k * (SIDE + MARGIN)
        pen.text((6, y + SIDE / 2 - 8), model, "black", font)
        pictures = [
            *(p for n in demo.NAMES for p in drawn[model].concepts[n][:shown]),
            *(p for pair in demo.PAIRS for p in drawn[model].pairs.get(pair, ())),
        ]
        for column, picture in enumerate(pictures):
            _paste(sheet, picture, column, y)
    return sheet


def _wrapped(text: str, font: Any) -> str:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= SIDE:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def heat_map(concepts: Mapping[str, Mapping[str, Concept]], path: Path) -> None:
    """Overlap of every two updates, ||dW_i dW_j^T|| / (||dW_i|| ||dW_j||), for both methods."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    titles = {"concepts": "Orthogonal Adaptation", "ordinary": "ordinary LoRA"}
    for axes, (place, learned) in zip(figure.subplots(1, 2), concepts.items(), strict=True):
        values = crosstalk.overlap_matrix(
            {n: flatten_layers(c.updates) for n, c in learned.items()}
        ).numpy()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="magma")
        axes.set_title(titles[place])
        axes.set_xticks(range(len(learned)), learned)
        axes.set_yticks(range(len(learned)), learned)
        for (i, j), value in _entries(values):
            axes.text(j, i, f"{value:.2f}", ha="center", color="white" if value < 0.6 else "black")
    figure.colorbar(image, ax=figure.axes, label="overlap of the updates")
    figure.savefig(path, dpi=120)


def _entries(values: Any) -> list[tuple[tuple[int, int], float]]:
    return [((i, j), float(v)) for i, row in enumerate(values) for j, v in enumerate(row)]


def write(
    folder: Path,
    card: Mapping[str, Any],
    drawn: Mapping[str, demo.DrawnImages],
    concepts: Mapping[str, Mapping[str, Concept]],
) -> None:
    """Write scorecard.json, scorecard.md, grid.png and crosstalk.png.

    Raises:
        StorageError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        facts = result_file.make_result("demo", "make demo", card["rows"], card["figures"])
        (folder / "scorecard.json").write_text(json.dumps(facts, indent=1) + "\n")
        (folder / "scorecard.md").write_text(markdown(card, folder))
        grid(drawn).save(folder / "grid.png")
        heat_map(concepts, folder / "crosstalk.png")
    except OSError as error:
        fix = "name another folder"
        raise storage_error(error, folder, "the demo's results", fix) from error
