"""The parts of `gpu.py` that load and merge."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import Row
from _gpu_run import Run, in_turns, learned


def loading(run: Run) -> Iterator[Row]:
    """Load and switch of 1, 8 and 50 LoRAs of SDXL: `load_custom` and diffusers' loaders."""
    from safetensors.torch import save_file

    from customize.families import family_of

    pipe = run.make("SDXL")
    shapes = family_of(pipe.components, pipe.config).adapter_targets("unet")
    counts = (1, 2) if run.tiny else (1, 8, 50)
    paths = []
    for number in range(max(counts)):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, width) in shapes.items():
            down = torch.randn(4, width, generator=generator) / width**0.5
            up = 0.02 * torch.randn(out, 4, generator=generator)
            tensors[f"unet.{name}.lora_A.weight"] = down.to(run.dtype)
            tensors[f"unet.{name}.lora_B.weight"] = up.to(run.dtype)
        paths.append(run.folder / f"lora{number}.safetensors")
        save_file(tensors, paths[-1])
    plain = run.draw(pipe)
    for load, switch, undo in SIDES.values():  # imports at the first use
        switch(pipe, load(run, pipe, paths[:1]), 0)
        undo(pipe)
    for count in counts:
        results, changed = {}, {}
        for side in ("ours", "theirs"):
            load, switch, undo = SIDES[side]
            started = time.perf_counter()
            names = load(run, pipe, paths[:count])
            run.wait()
            if names is None:
                undo(pipe)
                yield {"model": "SDXL", "what": f"{count} LoRAs, {side}", "note": "out of time"}
                continue
            loaded = time.perf_counter() - started
            switched = [run.seconds(partial(switch, pipe, names, n % count)) for n in (1, 2, 3)]
            results[side] = {"load": loaded, "switch": statistics.median(switched)}
            changed[side] = run.draw(pipe) - plain
            undo(pipe)
        for stage in ("load", "switch"):
            for side, seconds in results.items():
                ratio = seconds[stage] / results["theirs"][stage] if "theirs" in results else None
                yield {
                    "model": "SDXL",
                    "what": f"{stage} {count} LoRAs, {side}",
                    "seconds": seconds[stage],
                    **({} if ratio is None else {"ratio": f"{ratio:.3f}"}),
                }
        if len(changed) == 2:
            ours, theirs = changed["ours"], changed["theirs"]
            yield {
                "model": "SDXL",
                "what": f"{count} LoRAs: how far the two sides' latents are apart, "
                "as a share of what the LoRA changes",
                "error": float((ours - theirs).float().norm() / theirs.float().norm()),
            }


def _ours(run: Run, pipe: Any, paths: list[Path]) -> list[str] | None:
    pipe.load_custom(*paths, weights=[1 / len(paths)] * len(paths), merge="sum")
    return [path.stem for path in paths]


def _switch_ours(pipe: Any, names: list[str], number: int) -> None:
    pipe.load_custom(weights={name: float(i == number) for i, name in enumerate(names)})


def _theirs(run: Run, pipe: Any, paths: list[Path]) -> list[str] | None:
    names = []
    for path in paths:
        if time.monotonic() > run.end - 20:
            return None
        pipe.load_lora_weights(str(path), adapter_name=path.stem)
        names.append(path.stem)
    pipe.set_adapters(names, [1 / len(names)] * len(names))
    return names


def _switch_theirs(pipe: Any, names: list[str], number: int) -> None:
    pipe.set_adapters([names[number]], [1.0])


SIDES: dict[str, tuple[Any, Any, Any]] = {
    "ours": (_ours, _switch_ours, lambda pipe: pipe.unload_custom()),
    "theirs": (_theirs, _switch_theirs, lambda pipe: pipe.unload_lora_weights()),
}


def merging(run: Run) -> Iterator[Row]:
    """Merge concepts of SDXL by sum and by fusion, as an adapter and into the weights."""
    pipe = run.make("SDXL")
    count = 2 if run.tiny else 8
    folders = learned(run, "SDXL", pipe, count)
    for number in sorted({2, count}):
        for fuse in (False, True):
            ways = {
                f"{number} concepts, {method}{', fuse=True' * fuse}": (
                    pipe.unload_custom,
                    partial(pipe.load_custom, *folders[:number], merge=method, fuse=fuse),
                )
                for method in ("sum", "fusion")
            }
            for row in in_turns(run, ways, next(iter(ways))):
                yield {"model": "SDXL", **row}
    pipe.unload_custom()
