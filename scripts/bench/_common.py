"""Shared by all benchmarks: flags, tables, result files, processes and memory measurement."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from customize.openmp import limit_spinning

if TYPE_CHECKING:
    import torch

limit_spinning()  # before torch is imported

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))  # for storybook_training
Row = Mapping[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the flags that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result to this file"
    )
    made.add_argument(
        "--quick", action="store_true", help="fewer repeats: a rough figure in short time"
    )
    return made


def add_rewriters(made: argparse.ArgumentParser) -> None:
    """Add the flag ``--rewriter NAME=MODEL``, which is repeatable."""
    made.add_argument(
        "--rewriter",
        action="append",
        type=_pair,
        metavar="NAME=MODEL",
        help='row and language model, such as "miniature sft=runs/teach/sft" (default: the bundled '
        "miniature)",
    )


def rewriters(args: argparse.Namespace, bundled: str) -> dict[str, str]:
    """Name of a row -> language model.

    Args:
        args: The flags.
        bundled: Name of the bundled miniature, where no other model is given.
    """
    return dict(args.rewriter or [(bundled, str(ROOT / "assets" / "rewriter"))])


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MODEL")
    return name, value


def command() -> str:
    """The command of this result, with absolute paths shortened to their last part."""
    words = ["python", f"scripts/bench/{Path(sys.argv[0]).name}"]
    arguments = iter(sys.argv[1:])
    for word in arguments:
        if word == "--json":
            next(arguments, None)
        elif not word.startswith("--json="):
            words.append(Path(word).name if Path(word).is_absolute() else word)
    return shlex.join(words)


def apart(call: Callable[[], Any]) -> Any:
    """Run a call in a forked process and return its result.

    The process has all imports of this one. Call it before anything ran on several threads or on a
    GPU.
    """
    import multiprocessing

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(call()))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise SystemExit("a run failed; see above") from None
    finally:
        process.join()
    return result


def spread(values: Sequence[float]) -> str:
    """Format as "median (lowest to highest)"."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(
    bench: str, args: argparse.Namespace, rows: Sequence[Row], figures: Mapping[str, float]
) -> None:
    """Print the rows as a table and the figures below it; write both with `--json`."""
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
    write_result(bench, args, rows, figures)


def measured_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an earlier run that `--resume` keeps."""
    if not args.resume or args.json is None or not args.json.exists():
        return []
    earlier = json.loads(args.json.read_text())
    if ("--quick" in earlier["command"]) != args.quick:
        raise SystemExit(f"{args.json} was measured with another --quick")
    rows: list[dict[str, Any]] = earlier["rows"]
    return rows


def write_result(
    bench: str, args: argparse.Namespace, rows: Sequence[Row], figures: Mapping[str, float]
) -> None:
    """Write rows and figures with `--json`."""
    if args.json is None:
        return
    from customize.evaluation import result_file

    result = result_file.make_result(bench, command(), rows, figures)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def tensors_peak(call: Callable[[], Any], device: torch.device) -> int:
    """The peak memory in bytes that a call allocates."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiled:
        call()
    now = most = 0
    events = profiled.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
