"""Tables of calls with ``regions=`` and ``avoid=``, and of concepts in a style."""

from __future__ import annotations

from scripts.bench_tables.markdown import decimals, format_table, percent
from scripts.bench_tables.results import find_row, read_result


def regions_table() -> str:
    rows = []
    for label, drawn in (
        ("`regions=`, merged by fusion", "regions, fusion"),
        ("`regions=`, merged by a sum", "regions, sum"),
        ("regions in cross-attention alone (Mix-of-Show)", "regions in cross-attention, fusion"),
        ("plain prompt, fusion", "plain, fusion"),
        ("plain prompt, sum", "plain, sum"),
        ("plain prompt, average", "plain, average"),
        ("each concept alone in its half (ceiling)", "each alone"),
        ("64 x 64: `regions=`, fusion", "regions, fusion, 64 x 64"),
        ("64 x 64: plain prompt, fusion", "plain, fusion, 64 x 64"),
    ):
        row = find_row("regions", drawn=drawn)
        rates = [percent(row[column]) for column in ("both", "left", "right")]
        rows.append([label, *rates, decimals(row["seconds"], 1)])
    head = ["", "Both recognised", "Left", "Right", "Seconds a picture"]
    return format_table(head, rows)


_TASKS = {
    "personalization": "12 concepts",
    "style": "2 styles",
    "style_of_many": "2 styles of many things",
    "mixing": "12 concepts, each in a style",
}


def decor_table() -> str:
    rows = []
    for label, drawn in (
        ("as it is", "nothing"),
        ("weight 0.9", "weight 0.9"),
        ("negative prompt", "negative prompt"),
        ("negative prompt, weight 0.9", "negative prompt, weight 0.9"),
        ("**`avoid=`**", "avoiding, by default"),
        ('`avoid=` with `negative="keep"`', "avoiding, not in the negative prompt"),
        ("`avoid=` with words that did not leak", "avoiding, by default, words that did not leak"),
        ("captions that name it", "captions that name it"),
    ):
        cells = []
        for task in _TASKS:
            row = find_row("decor", task=task, drawn=drawn)
            cells.append(f"{percent(row['leak'])}; {percent(row['identity'])}")
        rows.append([label, *cells])
    return format_table(["Leak; identity", *_TASKS.values()], rows)


def decor_defaults_table() -> str:
    rows = []
    for label, drawn in (
        ("as it is", "nothing, contexts preserved"),
        ("negative prompt", "negative prompt, contexts preserved"),
        ("`avoid=`", "avoiding, by default, contexts preserved"),
    ):
        row = find_row("decor", task="personalization", drawn=drawn)
        rows.append([label, percent(row["leak"]), percent(row["identity"])])
    return format_table(["", "Leak", "Identity"], rows)


def decor_options_table() -> str:
    rows = []
    for row in read_result("decor")["rows"]:
        if row["task"] == "options":
            rates = [row[column] for column in ("leak", "identity", "prompt")]
            rows.append([row["drawn"], *map(percent, rates)])
    return format_table(["Six concepts", "Leak", "Identity", "Prompt"], rows)


def mixing_table() -> str:
    rows = []
    for label, drawn in (
        ("fusion, the concept named first", "nothing"),
        ("fusion, the style named first", "the style named first"),
        ("sum", "merged by sum"),
        ("`ties`", "merged by ties"),
        ("K-LoRA's choices, averaged over the steps", "merged by subject_style"),
    ):
        row = find_row("decor", task="mixing", drawn=drawn)
        rows.append([label, percent(row["identity"]), percent(row["prompt"])])
    return format_table(["Merge", "Concept and style recognised", "Prompt"], rows)
