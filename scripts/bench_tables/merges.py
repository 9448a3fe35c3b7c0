"""Tables of merging: identity, methods, solver, predicted crosstalk."""

from __future__ import annotations

from scripts.bench_tables.markdown import decimals, format_table
from scripts.bench_tables.results import find_row, read_result

_STORYBOOK = "merge_identity"
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


def _identity(method: str, k: int, classes: str, result: str = _STORYBOOK) -> str:
    return decimals(find_row(result, method=method, k=k, classes=classes)["identity"])


def _sum_identity(learned: str, k: int, classes: str, result: str) -> str:
    """The identity of a sum at weight 1 and at the tuned weight, with that weight."""
    tuned = find_row(result, method=f"{learned}, sum", k=k, classes=classes)
    text = f"{decimals(tuned['identity'])} ({tuned['weight']:.2g})"
    if tuned["weight"] == 1:
        return f"{decimals(tuned['identity'])}; {text}"
    try:
        method = f"{learned}, sum, at full weight"
        at_one = find_row(result, method=method, k=k, classes=classes)
    except LookupError:
        return f"-; {text}"
    return f"{decimals(at_one['identity'])}; {text}"


def _best_other(k: int, classes: str, result: str) -> str:
    """The best merge besides fusion and the plain sum, and its name."""
    names = [f"{_LORA}, {merge}" for merge in _MERGES[2:]] + [f"peft {name}" for name in _PEFT]
    rows = [find_row(result, method=name, k=k, classes=classes) for name in names]
    best = max(rows, key=lambda row: row["identity"])
    return f"{decimals(best['identity'])}, {best['method'].removeprefix(_LORA + ', ')}"


def merge_identity_table(result: str = _STORYBOOK) -> str:
    """The identity of merged concepts of the world of a result, by K and by method."""
    ours, paper, lora = (
        _identity(f"alone, {learned}", 1, "mixed classes", result)
        for learned in (_OURS, _PAPER, _LORA)
    )
    rows = [["1", ours, "", paper, "", lora, "", ""]]
    for label, k, classes in _GROUPS:
        lora = find_row(result, method=f"{_LORA}, sum", k=k, classes=classes)
        rows.append(
            [
                label,
                f"**{_identity(f'{_OURS}, fusion', k, classes, result)}**",
                _sum_identity(_OURS, k, classes, result),
                _identity(f"{_PAPER}, fusion", k, classes, result),
                _sum_identity(_PAPER, k, classes, result),
                _identity(f"{_LORA}, fusion", k, classes, result),
                f"{decimals(lora['identity'])} ({lora['weight']:.2g})",
                _best_other(k, classes, result),
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
