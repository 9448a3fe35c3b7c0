"""The time from LoRA files to weights with their sum: ours, diffusers', peft's, and a plain copy.

The UNet has the size of Stable Diffusion 1.5's. Its 128 attention projections, which the LoRAs of
rank 16 change, are random; its other weights are zeros, and the other components are the tests'
tiny ones, which no side changes. The files are in half precision, in the page cache.

- ours: `load_custom(*files, weights=..., merge="sum", fuse=True)`. It checks every file completely
  and copies each changed weight, so that unloading restores the same bits; the copy is part of its
  time, and the others make none. After each run the weights are compared bit for bit.
- diffusers: `load_lora_weights` per file, `set_adapters`, `fuse_lora`.
- peft cat: an adapter per file, `add_weighted_adapter(combination_type="cat")`, which is exact, and
  `merge_and_unload`.
- peft svd: the same with "svd", for two files and one layer of each shape, times the number of
  layers of that shape; it takes long, and its time does not depend on the number of files.
- copy: a clone of each changed weight, the minimum for any side that restores weights.

Sides take turns in one process, after one uncounted run of each. Time is the CPU time of one
thread, which other load affects little; `clock_s` is wall-clock time. Ratios are medians over
turns. `extra_mb` is the process's peak over its size afterwards; `merge_extra_mb` is torch's peak
over the copies.

The second table measures large N: concepts of rank 16 in slices of one basis, and ordinary LoRAs,
on the 8 projections of the middle block (1280 wide). There `merge_s` excludes opening the files,
`open_s`: the sum of concepts that share slices takes one product of the layer's width, for any
number of concepts, and the sum of their up-projections.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, parser, report, spread, tensors_peak
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

RANK = 16
MB = 2**20
CHANGED = re.compile(r".+\.attn[12]\.(to_[qkv]|to_out\.0)")
MIDDLE = re.compile(r"mid_block\..+\.attn[12]\.(to_[qkv]|to_out\.0)")
#: Files -> turns; diffusers takes minutes for fifty.
REPEATS = {2: 3, 8: 3, 50: 1}
#: How far two sides' changes of the weights may be apart, as a share of the change.
TOLERANCE = 1e-4
SLICED = (8, 50, 100, 200, 500, 1000)
ORDINARY = (8, 50, 100, 200)

Shapes = dict[str, tuple[int, int]]


def make_pipeline() -> Any:
    """A Stable Diffusion pipeline with a UNet of the size of 1.5's."""
    from diffusers import UNet2DConditionModel

    from tests.tiny import tiny_sd

    pipe = tiny_sd()
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768,
            attention_head_dim=8,
        )
    generator = torch.Generator().manual_seed(0)
    for name, module in unet.named_modules():
        for key, weight in list(module.named_parameters(recurse=False)):
            value = torch.zeros(weight.shape)
            if CHANGED.fullmatch(name) and key == "weight":
                value.normal_(std=0.02, generator=generator)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
    pipe.register_modules(unet=unet.eval())
    return pipe


def write_loras(shapes: Shapes, folder: Path, count: int, sliced: bool = False) -> list[Path]:
    """Write files with diffusers' keys, in slices of one basis or with separate factors."""
    from customize.core.bases import BASES, block, down_projection

    slices: dict[tuple[int, int], Tensor] = {}

    def down(width: int, number: int, generator: torch.Generator) -> Tensor:
        if not sliced:
            return torch.randn(RANK, width, generator=generator) / width**0.5
        number %= width // RANK
        if (width, number) not in slices:
            columns = block(number, width, RANK)
            slices[width, number] = down_projection(BASES["cosine"], width, columns, 0)
        return slices[width, number]

    folder.mkdir()
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, (out, width) in shapes.items():
            tensors[f"unet.{name}.lora_A.weight"] = down(width, number, generator).half()
            up = 0.02 * torch.randn(out, RANK, generator=generator)
            tensors[f"unet.{name}.lora_B.weight"] = up.half()
        paths.append(folder / f"lora{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


class Bench:
    """The pipeline, and its changed weights as they were."""

    def __init__(self) -> None:
        self.pipe = make_pipeline()
        modules = dict(self.pipe.unet.named_modules())
        self.weights = {name: modules[name].weight for name in modules if CHANGED.fullmatch(name)}
        self.shapes: Shapes = {n: (w.shape[0], w.shape[1]) for n, w in self.weights.items()}
        self.before = {name: weight.clone() for name, weight in self.weights.items()}

    def ours(self, paths: list[Any], weights: list[float]) -> None:
        self.pipe.load_custom(*paths, weights=weights, merge="sum", fuse=True)

    def undo_ours(self) -> None:
        self.pipe.unload_custom()
        for name, weight in self.weights.items():
            if not torch.equal(weight.view(torch.int32), self.before[name].view(torch.int32)):
                raise SystemExit(f"{name} is not what it was before load_custom")

    def diffusers(self, paths: list[Path], weights: list[float]) -> None:
        names = [path.stem for path in paths]
        for path, name in zip(paths, names, strict=True):
            self.pipe.load_lora_weights(path, adapter_name=name)
        self.pipe.set_adapters(names, weights)
        self.pipe.fuse_lora()

    def undo_diffusers(self) -> None:
        self.pipe.unfuse_lora()
        self.pipe.unload_lora_weights()
        self.restore()

    def peft_cat(self, paths: list[Path], weights: list[float]) -> None:
        self.peft(paths, weights, list(self.weights), "cat")

    def copy(self, paths: list[Path], weights: list[float]) -> None:
        self.copies = [weight.clone() for weight in self.weights.values()]

    def undo_copy(self) -> None:
        del self.copies

    def peft(self, paths: list[Path], weights: list[float], layers: list[str], how: str) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.utils import set_peft_model_state_dict

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
        names = [path.stem for path in paths]
        model = get_peft_model(self.pipe.unet, config, adapter_name=names[0])
        for path, name in zip(paths, names, strict=True):
            if name != names[0]:
                model.add_adapter(name, config)
            state = {
                f"base_model.model.{key.removeprefix('unet.')}": tensor
                for key, tensor in load_file(path).items()
                if key.removeprefix("unet.").rpartition(".lora_")[0] in layers
            }
            set_peft_model_state_dict(model, state, adapter_name=name)
        started = time.process_time()
        model.add_weighted_adapter(
            names,
            weights,
            "merged",
            combination_type=how,
            **({"svd_rank": RANK} if how == "svd" else {}),
        )
        self.combining = time.process_time() - started
        model.merge_and_unload(adapter_names=["merged"])

    def restore(self) -> None:
        # peft leaves its configuration on the model, and new objects for what it wrapped.
        vars(self.pipe.unet).pop("peft_config", None)
        for name, weight in self.weights.items():
            if self.pipe.unet.get_submodule(name).weight is not weight:
                raise SystemExit(f"{name} has another weight than before")
            weight.data.copy_(self.before[name])

    def changes(self) -> Tensor:
        """The changes of all weights, flattened."""
        pairs = ((weight, self.before[name]) for name, weight in self.weights.items())
        return torch.cat([(weight - before).flatten() for weight, before in pairs])


def memory(key: str) -> int:
    """The process's memory in bytes: "VmRSS" now, "VmHWM" at its peak."""
    text = Path("/proc/self/status").read_text()
    results = re.search(rf"{key}:\s+(\d+) kB", text)
    return int(results[1]) * 1024 if results else 0


def timed(call: Callable[[], Any]) -> dict[str, float]:
    """The time of a call."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    results = {"load_s": time.process_time() - cpu, "clock_s": time.perf_counter() - wall}
    return {**results, "extra_mb": (memory("VmHWM") - memory("VmRSS")) / MB}


@torch.no_grad()
def compare(
    bench: Bench, paths: list[Path], turns: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All sides in turns: a row per side, and the medians of the ratios."""
    weights = [1 / len(paths)] * len(paths)
    sides = {
        "ours": (bench.ours, bench.undo_ours),
        "diffusers": (bench.diffusers, bench.undo_diffusers),
        "peft cat": (bench.peft_cat, bench.restore),
        "copy": (bench.copy, bench.undo_copy),
    }
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    changes: dict[str, Tensor] = {}
    for turn in range(turns):
        for side in list(sides)[:: 1 if turn % 2 else -1]:
            do, undo = sides[side]
            runs[side].append(timed(partial(do, paths, weights)))
            if side != "copy" and not turn:
                changes[side] = bench.changes()
            undo()
    for side in ("diffusers", "peft cat"):
        difference = changes["ours"] - changes[side]
        error = float(difference.norm() / changes[side].norm())
        if not error <= TOLERANCE:
            raise SystemExit(f"with {len(paths)} files {side}'s weights differ by {error:.2g}")
    resident = sum(weight.nbytes for weight in bench.weights.values())
    peak = tensors_peak(lambda: bench.ours(paths, weights), torch.device("cpu"))
    bench.undo_ours()
    rows = [
        {
            "files": len(paths),
            "side": side,
            "load_s": spread([single_run["load_s"] for single_run in results]),
            "clock_s": statistics.median(single_run["clock_s"] for single_run in results),
            "extra_mb": statistics.median(single_run["extra_mb"] for single_run in results),
        }
        for side, results in runs.items()
    ]
    rows[0]["merge_extra_mb"] = (peak - resident) / MB

    def ratio(above: str, below: str) -> float:
        pairs = zip(runs[above], runs[below], strict=True)
        return statistics.median(a["load_s"] / b["load_s"] for a, b in pairs)

    count = len(paths)
    return rows, {
        f"speedup_n{count}": ratio("diffusers", "ours"),
        f"speedup_over_peft_cat_n{count}": ratio("peft cat", "ours"),
        f"over_copy_n{count}": ratio("ours", "copy"),
        f"merge_extra_mb_n{count}": rows[0]["merge_extra_mb"],
    }


def svd_seconds(bench: Bench, paths: list[Path]) -> float:
    """The time of peft's "svd" for all layers, extrapolated from one of each shape."""
    counts = Counter(bench.shapes.values())
    total = 0.0
    for shape, count in counts.items():
        layer = next(name for name, other_shape in bench.shapes.items() if other_shape == shape)
        bench.peft(paths, [0.5, 0.5], [layer], "svd")
        total += count * bench.combining
        bench.restore()
    return total


@torch.no_grad()
def curve(bench: Bench, folder: Path, kind: str, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Our time at increasing N, on the middle block."""
    shapes = {name: shape for name, shape in bench.shapes.items() if MIDDLE.fullmatch(name)}
    paths = write_loras(shapes, folder, max(counts), sliced=kind == "slices")
    rows = []
    for count in counts:
        files: list[Any] = []
        opening = timed(partial(_open, paths[:count], files))
        merging = []
        for _ in range(3):
            merging.append(timed(partial(bench.ours, files, [1 / count] * count))["load_s"])
            bench.undo_ours()
        rows.append(
            {
                "files": count,
                "side": f"ours, {kind}, middle block",
                "open_s": opening["load_s"],
                "merge_s": statistics.median(merging),
            }
        )
    return rows


def _open(paths: list[Path], files: list[Any]) -> None:
    from customize.concepts.formats.open_adaptation import open_adaptation

    files.extend(map(open_adaptation, paths))


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    repeats = {2: 1, 8: 1} if args.quick else REPEATS
    bench = Bench()
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_loras(bench.shapes, folder / "all", max(repeats))
        for do, undo in (
            (bench.ours, bench.undo_ours),
            (bench.diffusers, bench.undo_diffusers),
            (bench.peft_cat, bench.restore),
        ):
            do(paths[:2], [0.5, 0.5])
            undo()
        for count, turns in repeats.items():
            results, ratios = compare(bench, paths[:count], turns)
            rows += results
            figures |= ratios
            for row in results:
                print(*row.values(), flush=True)
        figures["peft_svd_s"] = svd_seconds(bench, paths[:2])
        figures["layer_mb"] = max(weight.nbytes for weight in bench.weights.values()) / MB
        for kind, counts in (("slices", SLICED), ("own downs", ORDINARY)):
            rows += curve(bench, folder / kind, kind, counts[:2] if args.quick else counts)
    by_count = {row["files"]: row["merge_s"] for row in rows if "slices" in row["side"]}
    figures["merge_s_growth_100_to_1000"] = by_count.get(1000, 0.0) / by_count.get(100, 1.0)
    return rows, {name: value for name, value in figures.items() if value}


def main() -> None:
    from diffusers.utils import logging

    import customize  # noqa: F401  so that pipelines have load_custom

    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # theirs warns that files have no text encoder layers
    report("merge_speed", args, *run(args))


if __name__ == "__main__":
    main()
