"""Tables of the bundled test world: the demo and its judges."""

from __future__ import annotations

from scripts.bench_tables.markdown import decimals, format_table, percent
from scripts.bench_tables.results import find_row, read_result


def demo_table() -> str:
    labels = {
        "base model": "Base model",
        "learned alone": "Orthogonal Adaptation, each concept alone",
        "merged": "Orthogonal Adaptation, three merged by fusion",
        "five references, no training": "Five reference images, no training",
        "ordinary LoRA alone": "Ordinary LoRA, each concept alone",
        "ordinary LoRAs merged": "Ordinary LoRAs, three summed",
    }
    rows = []
    drawn = {row["model"] for row in read_result("demo")["rows"]}
    for model, label in labels.items():
        if model == "five references, no training" and model not in drawn:
            continue  # measured without the reference model
        row = find_row("demo", model=model, concept="all")
        both = row["both_in_a_pair"]
        rates = [row[column] for column in ("identity", "prompt", "composition", "leak")]
        rows.append([label, *map(percent, rates), percent(both), decimals(row["drift"], 3)])
    head = ["", "Identity", "Prompt", "Composition", "Leak", "Both of a pair", "Drift"]
    return format_table(head, rows)


def storybook_table() -> str:
    attributes = ("all", "class", "colour", "pattern", "accessory", "place", "count")
    rows = []
    for row in read_result("storybook")["rows"]:
        cells = [percent(row[name]) if name in row else "" for name in attributes]
        rows.append([row["what"], *cells])
    return format_table(["", *(name.capitalize() for name in attributes)], rows)
