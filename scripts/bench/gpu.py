"""Measure everything that needs a GPU: SDXL and FLUX.1 dev at true size, with random weights.

    python scripts/bench/gpu.py

measures on one CUDA device, within --minutes (8), and downloads nothing:

- training: a step of SDXL at 1024 x 1024 against a reimplementation of the steps of diffusers'
  script: time and peak memory; plain, with the UNet in 4 bits, compiled;
- memory: for `memory=` of 8, 12, 16 and 24 GB the peak of one image and the plan's estimate, on a
  device limited to that size; for each training preset the peak of three steps and its estimate;
- attention: each installed backend, by its error against float64, time and peak memory; then four
  steps of both models with the correct ones: plain, with a concept, with `avoid=`;
- calls: four steps with one and two concepts, `avoid=`, `regions=` and a library, against none;
- loading: load and switch of 1, 8 and 50 LoRAs against diffusers' loaders;
- merging: 2 and 8 concepts by sum and by fusion, as an adapter and into the weights.

Each part is a process of its own. The result file is written after each part; --parts measures some
parts again and keeps the rows of the others. `ratio` is to the first way of its group, in turns
back and forth: median (lowest to highest). `counted_gib` is the estimate of the memory plan or of
the preset's file, without the GB reserved for the driver.

Requirements: torch (2.9 or newer) and the wheels of diffusers, transformers, accelerate, peft,
safetensors, huggingface-hub, tokenizers, pydantic, filelock, typer, rich, pyyaml, pillow and numpy;
bitsandbytes, torchao, xformers, flash-attn or sageattention add rows. `--device cpu --tiny` runs
every part with the tests' tiny models as a check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Row, command, report
from _gpu_loading import loading, merging
from _gpu_parts import attention, calls, memory
from _gpu_run import Run
from _gpu_steps import training

RESULT = ROOT / "scripts/bench/results/gpu.json"
_ROW = "row "
#: name -> part: a function that yields a row as soon as it has one, so that what was measured
#: before a crash or the end of the time is kept. They run in this order.
PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "training": training,
    "memory": memory,
    "attention": attention,
    "calls": calls,
    "loading": loading,
    "merging": merging,
}


def work(name: str, args: argparse.Namespace, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """The rows of one part, from a process of its own with a time limit in seconds."""
    words = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
    words += ["--device", args.device, "--minutes", str(seconds / 60)]
    words += ["--tiny"] * args.tiny + ["--quick"] * args.quick
    rows: list[dict[str, Any]] = []
    with (folder / f"{name}.log").open("w+") as log:
        child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
        timer = _kill_after(child, seconds)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith(_ROW):
                rows.append({"part": name} | json.loads(line.removeprefix(_ROW)))
                print(*rows[-1].values(), flush=True)
        status = child.wait()
        timer.cancel()
        if status:
            log.seek(0)
            log_lines = log.read().strip().splitlines() or [f"exit status {status}"]
            note = "out of time" if status < 0 and timer.finished.is_set() else log_lines[-1][:300]
            rows.append({"part": name, "model": "", "what": "ended early", "note": note})
            print("\n".join(log_lines[-20:]), file=sys.stderr)
    return rows


def _kill_after(child: subprocess.Popen[str], seconds: float) -> Any:
    import threading

    timer = threading.Timer(seconds, child.kill)
    timer.daemon = True
    timer.start()
    return timer


def worker(args: argparse.Namespace) -> None:
    """Measure one part and print its rows, a line of JSON each."""
    import warnings

    import diffusers
    import transformers

    import customize  # noqa: F401  so that pipelines have load_custom

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    run = Run(
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        tiny=args.tiny,
        quick=args.quick,
        folder=args.folder,
        end=time.monotonic() + 60 * args.minutes,
    )
    for row in PARTS[args.worker](run):
        print(_ROW + json.dumps(row), flush=True)


def known(path: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    if path is None or not path.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The number of rows and of failures, and the largest ratios of estimates."""
    both = [row for row in rows if row.get("counted_gib") and row.get("peak_gib")]
    counted = [row["peak_gib"] / row["counted_gib"] for row in both]
    failed = [row for row in rows if "seconds" not in row and "error" not in row]
    figures = {"rows": float(len(rows)), "rows_without_a_figure": float(len(failed))}
    return figures | ({"largest_peak_over_counted": max(counted)} if counted else {})


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--json", type=Path, metavar="FILE", help=f"default: {RESULT.name}")
    flags.add_argument("--quick", action="store_true", help="fewer repeats")
    flags.add_argument("--minutes", type=float, default=8, help="for all parts together")
    flags.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags.add_argument("--tiny", action="store_true", help="the tests' tiny models")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    flags.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.worker:
        return worker(args)
    names = [name for name in args.parts.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        raise SystemExit(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        raise SystemExit("true sizes need a CUDA device; on a CPU add --tiny")
    if args.json is None and not args.tiny:
        args.json = RESULT
    end = time.monotonic() + 60 * args.minutes
    rows = [row for row in known(args.json) if row["part"] not in names]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            left = end - time.monotonic()
            if left < 5:
                rows.append({"part": name, "model": "", "what": "not run", "note": "out of time"})
                continue
            rows += work(name, args, Path(folder), left)
            _write(args, rows)
    print(f"optional libraries here: {installed()}")
    report("gpu", args, rows, figures_of(rows))


def installed() -> str:
    """The optional libraries that are installed."""
    names = ("bitsandbytes", "torchao", "xformers", "flash_attn", "sageattention")
    return ", ".join(name for name in names if find_spec(name)) or "none"


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result file so far, replaced atomically."""
    if args.json is None:
        return
    from customize.atomic import write_atomic
    from customize.evaluation import result_file

    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = result_file.make_result("gpu", command(), rows, figures_of(rows))
    write_atomic(args.json, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    main()
