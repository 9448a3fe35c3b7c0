"""Tables of time and memory of loading, merging files, libraries and attention."""

from __future__ import annotations

from scripts.bench_tables.markdown import decimals, format_table, significant
from scripts.bench_tables.results import find_row, median, read_result


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
