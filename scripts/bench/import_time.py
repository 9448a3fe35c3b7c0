"""The time that `import customize` adds to diffusers, in fresh interpreters.

The statements of each pair run alternately, each time in a new interpreter, after one uncounted
run. The time is that of the statement, without the interpreter's start. The overhead of a pair is
the median of its differences; `import_overhead_s` is that of the worst pair. Wall-clock time is
meaningful on an idle machine only; compare it with the CPU time beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

from _common import ROOT, parser, report, spread

# The statement without this package, and the one with it.
PAIRS = {
    "the package alone": ("import diffusers", "import customize"),
    "both packages": ("import diffusers", "import diffusers; import customize"),
    "ready for a pipeline": (
        "from diffusers import DiffusionPipeline",
        "import customize; from diffusers import DiffusionPipeline",
    ),
    "a pipeline class": (
        "from diffusers import StableDiffusionPipeline",
        "import customize; from diffusers import StableDiffusionPipeline",
    ),
}
TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def seconds(statement: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of a statement in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(statement)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"`{statement}` failed:\n{done.stderr}")
    wall, cpu = map(float, done.stdout.splitlines()[-1].split())
    return wall, cpu


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument(
        "--repeats", type=int, help="counted runs of each statement (default: 11, quick 7)"
    )
    args = flags.parse_args()
    repeats = args.repeats or (7 if args.quick else 11)
    rows, overheads = [], []
    for name, (without, with_pack) in PAIRS.items():
        times: dict[str, list[tuple[float, float]]] = {without: [], with_pack: []}
        for turn in range(repeats + 1):
            for statement in times if turn % 2 else reversed(times):
                taken = seconds(statement)
                if turn:
                    times[statement].append(taken)
        turns = list(zip(times[without], times[with_pack], strict=True))
        wall, cpu = (statistics.median(b[k] - a[k] for a, b in turns) for k in (0, 1))
        overheads.append(wall)
        rows.append(
            {
                "pair": name,
                "without": without,
                "with": with_pack,
                "without_s": spread([taken for taken, _ in times[without]]),
                "with_s": spread([taken for taken, _ in times[with_pack]]),
                "overhead_s": wall,
                "cpu_overhead_s": cpu,
            }
        )
    report("import_time", args, rows, {"import_overhead_s": max(overheads)})


if __name__ == "__main__":
    main()
