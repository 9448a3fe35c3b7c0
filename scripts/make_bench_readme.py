"""Write the tables of scripts/bench/README.md from the result files in scripts/bench/results/.

    python scripts/make_bench_readme.py            # rewrite every table between its markers
    python scripts/make_bench_readme.py --check    # exit with 1 when a table differs, and print it

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; NAME is a key of
``TABLES``. The text around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "scripts" / "bench" / "README.md"
RESULTS = ROOT / "scripts" / "bench" / "results"

Row = Mapping[str, Any]
_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
_SOURCE = re.compile(r"(?P<result>\w+):(?P<key>[^\[\]]+)(?:\[(?P<conditions>[^\]]*)\])?")


@cache
def read_result(name: str) -> dict[str, Any]:
    """Return the content of ``scripts/bench/results/NAME.json``."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def find_row(result: str, **conditions: Any) -> Row:
    """Return the only row of a result whose columns have these values.

    Raises:
        LookupError: no row matches, or several do.
    """
    matches = [
        row
        for row in read_result(result)["rows"]
        if all(str(row.get(column)) == str(value) for column, value in conditions.items())
    ]
    if len(matches) != 1:
        raise LookupError(f"{len(matches)} rows of {result}.json match {conditions}")
    row: Row = matches[0]
    return row


def read_figure(source: str) -> float:
    """Return the number that a source names.

    Args:
        source: ``RESULT:KEY`` for an entry of a result's "figures", such as
            ``demo:identity_merged``; ``RESULT:COLUMN[COLUMN=VALUE & ...]`` for a cell of its rows,
            such as ``regions:both[drawn=plain, sum]``; or two of these with " / " or " - " between
            them.

    Raises:
        LookupError: the file, the key or the row does not exist.
    """
    for operator, compute in (
        (" / ", lambda a, b: a / b),
        (" - ", lambda a, b: a - b),
    ):
        first, separator, second = source.partition(operator)
        if separator and ":" in second:
            return float(compute(read_figure(first), read_figure(second)))
    match = _SOURCE.fullmatch(source.strip())
    if match is None:
        raise LookupError(f"{source!r} is not a source such as demo:identity_merged")
    result, key, conditions = match["result"], match["key"], match["conditions"]
    if not (RESULTS / f"{result}.json").is_file():
        raise LookupError(f"there is no result file {result}.json")
    if conditions is None:
        return float(read_result(result)["figures"][key])
    pairs = (condition.split("=", 1) for condition in conditions.split(" & "))
    return median(find_row(result, **{column.strip(): value for column, value in pairs})[key])


def median(cell: Any) -> float:
    """Return the number of a cell, which may be written as "median (lowest to highest)"."""
    return float(cell.split()[0]) if isinstance(cell, str) else float(cell)


def percent(value: float | None) -> str:
    """Format a fraction as a percentage without decimals; halves are rounded up."""
    return "" if value is None else f"{math.floor(100 * value + 0.5)} %"


def decimals(value: float | None, places: int = 2) -> str:
    """Format a number with a fixed number of decimals; an empty cell for None."""
    return "" if value is None else f"{value:.{places}f}"


def significant(value: float | None) -> str:
    """Format a number with two significant digits and without an exponent."""
    if value is None:
        return ""
    places = 0 if abs(value) >= 10 else 1 if abs(value) >= 1 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{places}f}"


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Format a Markdown table; columns after the first ``text_columns`` are right-aligned."""
    line = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, line, *rows])


def results_table() -> str:
    """The commands, machines and versions of all results."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        result = read_result(path.stem)
        machine, versions = result["machine"], result["versions"]
        rows.append(
            [
                f"[{path.name}](results/{path.name})",
                f"`{result['command']}`",
                f"{machine['cpu']}, {machine['cores']} cores",
                f"{versions['torch']}; {versions['diffusers']}",
            ]
        )
    return format_table(["Result", "Command", "Machine", "torch; diffusers"], rows, 4)


def demo_table() -> str:
    labels = {
        "base model": "Base model",
        "learned alone": "Orthogonal Adaptation, each concept alone",
        "merged": "Orthogonal Adaptation, three merged by fusion",
        "ordinary LoRA alone": "Ordinary LoRA, each concept alone",
        "ordinary LoRAs merged": "Ordinary LoRAs, three summed",
    }
    rows = []
    for model, label in labels.items():
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


_OURS, _PAPER, _LORA = "slices that avoid what is shared", "the paper's slices", "ordinary LoRA"
_MERGES = ("fusion", "sum", "average", "truncate", "magnitude", "dare", "ties")
_PEFT = ("linear", "ties", "dare_linear")
_GROUPS = (
    ("2, one class", 2, "same class"),
    ("2, two classes", 2, "mixed classes"),
    ("3", 3, "mixed classes"),
    ("5", 5, "mixed classes"),
    ("9", 9, "mixed classes"),
    ("13", 13, "mixed classes"),
)


def _identity(method: str, k: int, classes: str) -> str:
    return decimals(find_row("merge_identity", method=method, k=k, classes=classes)["identity"])


def _sum_identity(learned: str, k: int, classes: str) -> str:
    """The identity of a sum at weight 1 and at the tuned weight, with that weight."""
    tuned = find_row("merge_identity", method=f"{learned}, sum", k=k, classes=classes)
    text = f"{decimals(tuned['identity'])} ({tuned['weight']:.2g})"
    if tuned["weight"] == 1:
        return f"{decimals(tuned['identity'])}; {text}"
    try:
        method = f"{learned}, sum, at full weight"
        at_one = find_row("merge_identity", method=method, k=k, classes=classes)
    except LookupError:
        return f"-; {text}"
    return f"{decimals(at_one['identity'])}; {text}"


def _best_other(k: int, classes: str) -> str:
    """The best merge besides fusion and the plain sum, and its name."""
    names = [f"{_LORA}, {merge}" for merge in _MERGES[2:]] + [f"peft {name}" for name in _PEFT]
    rows = [find_row("merge_identity", method=name, k=k, classes=classes) for name in names]
    best = max(rows, key=lambda row: row["identity"])
    return f"{decimals(best['identity'])}, {best['method'].removeprefix(_LORA + ', ')}"


def merge_identity_table() -> str:
    ours, paper, lora = (
        _identity(f"alone, {learned}", 1, "mixed classes") for learned in (_OURS, _PAPER, _LORA)
    )
    rows = [["1", ours, "", paper, "", lora, "", ""]]
    for label, k, classes in _GROUPS:
        lora = find_row("merge_identity", method=f"{_LORA}, sum", k=k, classes=classes)
        rows.append(
            [
                label,
                f"**{_identity(f'{_OURS}, fusion', k, classes)}**",
                _sum_identity(_OURS, k, classes),
                _identity(f"{_PAPER}, fusion", k, classes),
                _sum_identity(_PAPER, k, classes),
                _identity(f"{_LORA}, fusion", k, classes),
                f"{decimals(lora['identity'])} ({lora['weight']:.2g})",
                _best_other(k, classes),
            ]
        )
    head = [
        "Concepts merged",
        "Ours: fusion",
        "Ours: sum at weight 1; tuned",
        "Paper's slices: fusion",
        "Paper's slices: sum at weight 1; tuned",
        "Ordinary LoRA: fusion",
        "Ordinary LoRA: sum, tuned",
        "Ordinary LoRA: best other merge, tuned",
    ]
    return format_table(head, rows)


def merge_methods_table() -> str:
    methods = [(f"`{merge}`", f"{_LORA}, {merge}") for merge in _MERGES]
    methods += [(f"peft's `{name}`", f"peft {name}") for name in _PEFT]
    rows = []
    for label, method in methods:
        cost = find_row("merge_identity", method=method, k=13)
        cells = [_identity(method, k, classes) for _, k, classes in _GROUPS]
        cells += [decimals(cost["merge_seconds"]), decimals(cost["merge_mib"], 1)]
        rows.append([label, *cells])
    head = ["Merge", *(label for label, _, _ in _GROUPS), "Seconds", "MiB"]
    return format_table(head, rows)


def merge_solver_table() -> str:
    rows = []
    for row in read_result("merge_solver")["rows"]:
        cells = [decimals(row["identity"]), decimals(row["merge_seconds"])]
        learned = "ours" if row["learned"] == _OURS else row["learned"]
        solver = {"fusion": "closed form"}.get(row["merge"], "L-BFGS loop of Mix-of-Show")
        rows.append([learned, solver, *cells])
    return format_table(["Concepts", "Solver", "Identity", "Seconds"], rows, 2)


def crosstalk_table() -> str:
    figures = read_result("crosstalk")["figures"]
    rows = []
    for label, key in (
        ("`inspect`, with recorded layer inputs", "crosstalk_rank_correlation"),
        ("overlap of the factors alone", "crosstalk_rank_correlation_factors"),
    ):
        rows.append([label, decimals(figures[key]), decimals(figures[f"{key}_pairs"])])
    return format_table(["Prediction", "Sums of 2 to 13", "Pairs"], rows)


def merge_speed_table() -> str:
    figures = read_result("merge_speed")["figures"]
    rows = []
    for n in (2, 8, 50):
        ours = find_row("merge_speed", side="ours", files=n)
        keys = (f"speedup_n{n}", f"speedup_over_peft_cat_n{n}", f"over_copy_n{n}")
        rows.append(
            [
                str(n),
                decimals(median(ours["load_s"])),
                *(significant(figures[key]) for key in keys),
                decimals(figures[f"merge_extra_mb_n{n}"], 1),
            ]
        )
    head = [
        "Files",
        "Ours, s",
        "Speedup over `load_lora_weights` + `fuse_lora`",
        "Speedup over peft's `cat`",
        "Time over one copy of the weights",
        "Extra memory, MB",
    ]
    return format_table(head, rows)


def merge_growth_table() -> str:
    rows = []
    for n in (100, 200, 500, 1000):
        row = find_row("merge_speed", side="ours, slices, middle block", files=n)
        rows.append([str(n), decimals(row["open_s"]), decimals(row["merge_s"])])
    return format_table(["Concepts", "Reading, s", "Merging, s"], rows)


def truncate_table() -> str:
    rows = []
    for width in (640, 1280, 3072):
        ours = find_row("truncate", side="ours", width=width)
        dense = find_row("truncate", side="dense svd", width=width)
        rows.append(
            [
                str(width),
                significant(median(ours["ms"])),
                f"{median(dense['ms']):.0f}",
                significant(dense["ours_is_faster"]),
                ours["relative_error"],
            ]
        )
    head = ["Width", "From factors, ms", "`torch.linalg.svd`, ms", "Speedup", "Relative error"]
    return format_table(head, rows)


def load_many_table() -> str:
    rows = []
    for n in (1, 10, 50):
        ours, theirs = (find_row("load_many", side=side, files=n) for side in ("ours", "theirs"))
        times = [decimals(median(row["load_s"])) for row in (ours, theirs)]
        rows.append([str(n), *times, significant(ours["speedup"])])
    head = ["Files", "`load_custom`, s", "`load_lora_weights`, s", "Speedup"]
    return format_table(head, rows)


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


def decor_options_table() -> str:
    rows = []
    for row in read_result("decor")["rows"]:
        if row["task"] == "options":
            rates = [row[column] for column in ("leak", "identity", "prompt")]
            rows.append([row["drawn"], *map(percent, rates)])
    return format_table(["Six concepts", "Leak", "Identity", "Prompt"], rows)


def class_preservation_table() -> str:
    rows = []
    for label, preserved in (
        ("`none`", "nothing"),
        ("`class_text`, as in the paper", "class_text, paper"),
        ("`class_text`, as in the published code", "class_text, published code"),
        ("`context_text`", "context_text"),
        ("`prior` (class pictures)", "prior"),
        ("`output`", "output"),
        ("**`context_output=0.5`** (default)", "context_output, half the weight"),
        ("`context_output=1`", "context_output"),
        ("`context_output=1`, contexts not asked for", "context_output, of places alone"),
        ("`context_output=1,output=1`", "context_output and output"),
    ):
        row = find_row("class_preservation", preserved=preserved, steps=1500)
        rates = [percent(row[column]) for column in ("identity", "prompt", "of_base")]
        costs = [decimals(row["step_cost"]), decimals(row["memory_cost"])]
        rows.append([label, *rates, *costs])
    head = ["`preserve`", "Identity", "Prompt", "Composition, of the base's", "Step time", "Memory"]
    return format_table(head, rows)


def composition_table() -> str:
    rows = []
    for label, preserved in (
        ("`none`", "nothing"),
        ("`context_output=0.5` (default)", "context_output, half the weight"),
    ):
        cells = []
        for steps in (200, 500, 1500):
            row = find_row("class_preservation", preserved=preserved, steps=steps)
            cells.append(f"{percent(row['identity'])}; {percent(row['of_base'])}")
        rows.append([label, *cells])
    head = ["Identity; composition", "200 steps", "500 steps", "1500 steps"]
    return format_table(head, rows)


def library_table() -> str:
    rows = []
    sides = (("ours", "`library=`"), ("diffusers", "diffusers, `set_adapters`"))
    for side, label in sides:
        for row in read_result("library")["rows"]:
            if row["side"] == side:
                rows.append(
                    [
                        label,
                        f"{row['concepts']:,}",
                        decimals(row["warm_ratio"], 3),
                        decimals(row.get("pair_warm_ratio"), 3),
                        decimals(median(row["cold_s"])) if row.get("cold_s") else "",
                        decimals(row.get("load_s"), 1),
                        decimals(row["memory_mb"], 0),
                    ]
                )
    head = [
        "",
        "Concepts",
        "Time, one concept",
        "Time, two fused",
        "First use, s",
        "Loading all, s",
        "Memory, MB",
    ]
    return format_table(head, rows)


def train_step_table() -> str:
    rows = []
    for row in read_result("train_step")["rows"]:
        cells = [decimals(median(row["step_s"])), decimals(row["step_ratio"])]
        cells += [f"{median(row['peak_mib']):.0f}", decimals(row["peak_ratio"])]
        rows.append([row["base"], row["trained"], row["side"], *cells])
    head = ["Base", "Trained", "Loop", "Step, s", "Step time, ratio", "Peak, MiB", "Memory, ratio"]
    return format_table(head, rows, 3)


def families_table() -> str:
    rows = []
    result = read_result("families")["rows"]
    by_family = {(row["family"], row["side"]): row for row in result}
    for row in result:
        if row["side"] != "ours, orthogonal":
            continue
        columns = ("step_time_ratio", "peak_memory_ratio", "process_memory_ratio")
        cells = [decimals(row.get(column)) for column in columns]
        script = f"`{row['script']}`" if row["script"] != "none" else "no script"
        own = by_family.get((row["family"], "theirs, own layers"))
        for column in columns[:2]:
            cells.append(decimals(row[column] / own[column]) if own else "")
        rows.append([f"`{row['family']}`", script, *cells])
    head = ["Family", "Script of diffusers", "Step time", "Tensors' memory", "Process's memory"]
    head += ["Step time, script's layers", "Memory, script's layers"]
    return format_table(head, rows, 2)


def attention_table() -> str:
    rows = []
    for row in read_result("attention")["rows"]:
        if "heads" in row:
            shape = f"{row['model']}, {row['tokens']} tokens"
            cells = [decimals(median(row["time"])), decimals(row["peak_mib"], 0)]
            rows.append([shape, f"`{row['how']}`", *cells, f"{row['error']:.0e}"])
    return format_table(["Heads of", "Backend", "Time", "Peak, MiB", "Error"], rows, 2)


def memory_table() -> str:
    rows = []
    for row in read_result("attention")["rows"]:
        if "counted_mib" in row:
            cells = [decimals(row[column], 0) for column in ("counted_mib", "peak_mib")]
            rows.append([row["how"], *cells, decimals(median(row["time"]))])
    return format_table(["The bundled base on a CPU", "Counted, MiB", "Peak, MiB", "Time"], rows)


def import_time_table() -> str:
    rows = []
    for row in read_result("import_time")["rows"]:
        times = [median(row[column]) for column in ("without_s", "with_s")]
        cells = [*(decimals(time) for time in times), decimals(row["overhead_s"], 3)]
        rows.append([f"`{row['without']}`", f"`{row['with']}`", *cells])
    return format_table(["Without", "With", "Without, s", "With, s", "Difference, s"], rows, 2)


TABLES: dict[str, Callable[[], str]] = {
    "results": results_table,
    "demo": demo_table,
    "storybook": storybook_table,
    "merge_identity": merge_identity_table,
    "merge_methods": merge_methods_table,
    "merge_solver": merge_solver_table,
    "crosstalk": crosstalk_table,
    "merge_speed": merge_speed_table,
    "merge_growth": merge_growth_table,
    "truncate": truncate_table,
    "load_many": load_many_table,
    "regions": regions_table,
    "decor": decor_table,
    "decor_defaults": decor_defaults_table,
    "decor_options": decor_options_table,
    "mixing": mixing_table,
    "class_preservation": class_preservation_table,
    "composition": composition_table,
    "library": library_table,
    "train_step": train_step_table,
    "families": families_table,
    "attention": attention_table,
    "memory": memory_table,
    "import_time": import_time_table,
}


def render(text: str) -> str:
    """Return a README's text with every table between markers replaced by the current one.

    Raises:
        KeyError: a marker names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end of table -->"

    return _TABLE.sub(replace, text)


def main() -> int:
    """Rewrite the README, or compare with it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 when a table differs"
    )
    arguments = parser.parse_args()
    text = README.read_text()
    rendered = render(text)
    if not arguments.check:
        README.write_text(rendered)
        return 0
    written = {match[1]: match[0] for match in _TABLE.finditer(text)}
    differing = [m[1] for m in _TABLE.finditer(rendered) if written[m[1]] != m[0]]
    for name in differing:
        print(f"{README.relative_to(ROOT)}: the table {name} differs from the results")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
