"""Tables of training: class preservation, and the cost of a step."""

from __future__ import annotations

from scripts.bench_tables.markdown import decimals, format_table, percent
from scripts.bench_tables.results import find_row, median, read_result


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
