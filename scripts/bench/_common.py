"""What every benchmark shares: its flags, the machine it ran on, its table and its result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "diffusers-customize",
)

Row = Mapping[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the flags that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--quick", action="store_true", help="fewer repeats: a rough figure, soon")
    return made


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures depend on; nothing that tells one machine of a kind from another."""
    import torch

    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    found: dict[str, Any] = {
        "cpu": cpu or platform.machine(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(memory / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command that gives this result; of absolute paths only the last part is told."""
    words = ["python", f"scripts/bench/{Path(sys.argv[0]).name}"]
    rest = iter(sys.argv[1:])
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if Path(word).is_absolute() else word)
    return " ".join(words)


def spread(values: Sequence[float]) -> str:
    """ "median (lowest to highest)" """
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(
    bench: str, args: argparse.Namespace, rows: Sequence[Row], figures: Mapping[str, float]
) -> None:
    """Print the rows as a table and the figures below it; write all with `--json`."""
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=bench + (" (quick)" if args.quick else ""))
    for column in columns:
        words = all(isinstance(row[column], str) for row in rows if column in row)
        table.add_column(column.replace("_", " "), justify="left" if words else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for key, value in figures.items():
        console.print(f"{key} = {value:.4g}", highlight=False)
    if args.json is not None:
        result = {
            "bench": bench,
            "command": command(),
            "machine": machine(),
            "versions": versions(),
            "rows": [dict(row) for row in rows],
            "figures": dict(figures),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
