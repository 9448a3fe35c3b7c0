"""Jobs of a benchmark in processes of one core each, which takes the least time in total.

Each result is stored in a file of its own, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from customize.atomic import write_atomic
from customize.storybook.bundled_assets import assets_folder


def add_arguments(parser: argparse.ArgumentParser, folder: str, *stages: str) -> None:
    """Add the flags of such a benchmark, and hidden ones for the jobs of its worker processes.

    Args:
        parser: of the benchmark.
        folder: default folder for results.
        stages: names such as "learn", for :func:`share_out`.
    """
    assets = assets_folder()
    parser.add_argument("--base", type=Path, default=assets / "storybook", help="base model")
    parser.add_argument("--judges", type=Path, default=assets / "judges", help="of the pictures")
    parser.add_argument(
        "--folder", type=Path, default=Path(folder), help="for trained concepts and scores"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one core each")
    for stage in stages:
        parser.add_argument(f"--{stage}", nargs="*", help=argparse.SUPPRESS)


def share_out(args: argparse.Namespace, stage: str, jobs: Sequence[str], *more: str) -> None:
    """Run jobs in processes that run this script with the same arguments and `--stage job ...`.

    Raises:
        SystemExit: one of them failed.
    """
    arguments = ["--folder", args.folder, "--base", args.base, "--judges", args.judges, *more]
    arguments += ["--quick"] if args.quick else []
    start = [sys.executable, sys.argv[0], *map(str, arguments), f"--{stage}"]
    running = [
        subprocess.Popen([*start, *jobs[worker :: args.workers]])
        for worker in range(min(args.workers, len(jobs)))
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("something could not be learned or scored; see above")


def keep(path: Path, result: Any) -> None:
    """Write a result atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result).encode())


def folder_name(text: str) -> str:
    return re.sub("[^a-z0-9]+", "-", text.lower())


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))
