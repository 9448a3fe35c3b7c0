"""Result files: measured figures with the machine and the versions they depend on."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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


def usable_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores, system, memory in GiB, and GPU, without the machine's name."""
    import torch

    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    facts: dict[str, Any] = {
        "cpu": cpu or platform.machine(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        facts["memory_gib"] = round(memory / 2**30, 1)
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def make_result(
    bench: str, command: str, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, float]
) -> dict[str, Any]:
    """The content of a result file.

    Args:
        bench: Name of the benchmark or command.
        command: Command that produced the result.
        rows: Measurements.
        figures: Headline numbers.
    """
    return {
        "bench": bench,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "rows": [dict(row) for row in rows],
        "figures": dict(figures),
    }


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def format_percent(value: float, spread: float | None = None) -> str:
    """Format a share in [0, 1] and its standard deviation in percent: "86% ±7"."""
    return f"{value:.0%}" + ("" if spread is None else f" ±{100 * spread:.0f}")
