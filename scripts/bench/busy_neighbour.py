"""Training steps of the bundled UNet beside busy processes, for several settings of OpenMP.

Threads that wait for others spin before they sleep, and then use up the time slices of the threads
that they wait for. libgomp, which torch's CPU builds use, spins for GOMP_SPINCOUNT iterations.

A process for each setting runs forward and backward passes at batch 4, in turns: alone, then beside
one busy process on each core. Cells are medians over all steps; `cpu_seconds` is the CPU time of a
step over all threads. "Alone" is without the busy processes of this script: other processes on the
machine still count, so compare settings within a run only.

    python scripts/bench/busy_neighbour.py --json scripts/bench/results/busy_neighbour.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import _common

#: Setting -> environment variables; all settings without OMP_NUM_THREADS use two threads.
SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


class Worker:
    """A process that runs training steps with its own OpenMP settings on request."""

    def __init__(self, variables: dict[str, str]) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env=environment | {"OMP_NUM_THREADS": "2"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, steps: int) -> list[tuple[float, float]]:
        """Run steps; return the seconds and the CPU seconds of each."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        times: list[tuple[float, float]] = json.loads(self.process.stdout.readline())
        return times


def serve() -> None:
    """Run as many training steps as each line of stdin says, and print their times."""
    import torch
    from diffusers import UNet2DConditionModel

    from customize.storybook.bundled_assets import assets_folder

    unet: Any = UNet2DConditionModel.from_pretrained(assets_folder() / "storybook" / "unet")
    unet.float().train()
    generator = torch.Generator().manual_seed(0)
    size, width = unet.config.sample_size, unet.config.cross_attention_dim
    latents = torch.randn(4, unet.config.in_channels, size, size, generator=generator)
    text = torch.randn(4, 77, width, generator=generator)
    timesteps = torch.full((4,), 500)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start, cpu_start = time.perf_counter(), time.process_time()
            unet.zero_grad()
            unet(latents, timesteps, text).sample.square().mean().backward()
            times.append((time.perf_counter() - start, time.process_time() - cpu_start))
        print(json.dumps(times), flush=True)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy within the context."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure all settings in turns."""
    from customize.evaluation.result_file import usable_cores

    rounds, steps = (1, 2) if quick else (8, 6)
    workers = {setting: Worker(variables) for setting, variables in SETTINGS.items()}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    try:
        for worker in workers.values():
            worker.run(1)  # warm-up
        for _ in range(rounds):
            for load, count in (("alone", 0), ("busy", usable_cores())):
                with busy_processes(count):
                    for setting, worker in workers.items():
                        measured = worker.run(steps)
                        times.setdefault((setting, load), []).extend(measured)
                        print(load, setting, [round(s, 3) for s, _ in measured], flush=True)
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    rows = []
    for setting in SETTINGS:
        row: dict[str, Any] = {"setting": setting}
        for load in ("alone", "busy"):
            seconds, cpu_seconds = zip(*times[setting, load], strict=True)
            row |= {f"{load}_seconds": median(seconds), f"{load}_slowest": max(seconds)}
            row[f"{load}_cpu_seconds"] = median(cpu_seconds)
        rows.append(row)
    figures = {
        f"{load}_over_default_{row['setting']}": row[f"{load}_seconds"] / rows[0][f"{load}_seconds"]
        for row in rows[1:]
        for load in ("alone", "busy")
    }
    return rows, figures


def main() -> None:
    parser = _common.parser(__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve()
    else:
        _common.report("busy_neighbour", args, *run(args.quick))


if __name__ == "__main__":
    main()
