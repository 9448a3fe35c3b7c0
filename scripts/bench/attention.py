"""Compare attention backends with torch's default, and ways of fitting a model into memory.

Backends: one self-attention of random numbers with the heads of published models, at the tokens of
a 1024 x 1024 image (512 x 512 for Stable Diffusion 1.5) and its prompt; on a CPU at half the side,
and shorter with --quick. Backends run in turns, back and forth, and `time` is the ratio to `native`
of the same turn: median (lowest to highest). `error` is the one that `load_custom` measures before
it selects a backend. Backends that are not installed, or have no kernel for this device, are
listed.

Memory: the bundled base generates one image, in turns as above, with `time` as the ratio to the
unchanged model. `counted_mib` is the plan's estimate, and `peak_mib` the peak on the device. The
base is small, so this checks the estimate, not the saving.

On a machine with other load only ratios are meaningful.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from _common import ROOT, Row, parser, report, spread, tensors_peak

from customize.base.apply_memory_plan import apply_memory_plan, execution_device
from customize.base.attention.backends import (
    HeadShape,
    measure_error,
    run_attention,
    time_attention,
)
from customize.base.memory_plan import (
    GIB,
    STRATEGIES,
    STRATEGIES_WITHOUT_OFFLOAD,
    MemoryPlan,
    MemoryStrategy,
    estimate_peak_bytes,
    measure_components,
)
from customize.families import family_of

#: model -> heads of its largest attentions, and tokens of picture and prompt.
SHAPES = {
    "Stable Diffusion 1.5": (HeadShape(8, 40), 4096, 0),
    "SDXL": (HeadShape(10, 64), 4096, 0),
    "Stable Diffusion 3.5 large": (HeadShape(38, 64), 4096, 333),
    "FLUX.1, Qwen-Image": (HeadShape(24, 128), 4096, 512),
    "AutoencoderKL": (HeadShape(1, 512), 16384, 0),
}
OTHERS = ("_native_math", "_native_flash", "_native_efficient", "_native_cudnn", "flex")
OTHERS += ("xformers", "flash", "_flash_3", "sage")


def backends(
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
    repeats: int,
    shapes: Mapping[str, tuple[HeadShape, int, int]] = SHAPES,
) -> list[Row]:
    """A row per shape and backend."""
    rows: list[Row] = []
    missing: dict[str, str] = {}
    share = 16 if quick else 4 if device.type == "cpu" else 1
    for model, (heads, picture, prompt) in shapes.items():
        tokens = picture // share + prompt
        errors = {}
        for name in ("native", *OTHERS):
            try:
                errors[name] = measure_error(name, heads, device, dtype, None)
            except Exception as problem:  # missing kernels raise all kinds of errors
                missing.setdefault(name, f"{name}, not here: {str(problem).splitlines()[0]}")
        taken: dict[str, list[float]] = {name: [] for name in errors}
        for turn in range(repeats):
            for name in taken if turn % 2 else reversed(taken):
                taken[name] += time_attention(name, heads, device, dtype, tokens, 1)
        query = torch.randn(1, tokens, *heads, device=device, dtype=dtype)
        for name, times in taken.items():
            peak = tensors_peak(partial(run_attention, name, query, query, query), device)
            rows.append(
                {
                    "model": model,
                    "heads": f"{heads.number} x {heads.width}",
                    "tokens": tokens,
                    "how": name,
                    "time": _ratios(times, taken["native"]),
                    "peak_mib": peak / 2**20,
                    "error": errors[name],
                }
            )
    print(*missing.values(), sep="\n")
    return rows


def ways(repeats: int) -> list[Row]:
    """A row per way to fit the bundled base into memory, except those that load it again."""
    from diffusers import DiffusionPipeline

    pipes, counted = {}, {}
    offloading = torch.accelerator.is_available()
    for way in STRATEGIES if offloading else STRATEGIES_WITHOUT_OFFLOAD:
        if way.quantize:
            continue
        pipe = DiffusionPipeline.from_pretrained(ROOT / "assets/storybook")
        pipe.set_progress_bar_config(disable=True)
        family = family_of(pipe.components)
        device = execution_device(pipe, family, use_accelerator=True)
        counted[way] = estimate_peak_bytes(measure_components(family), way)
        with apply_memory_plan(pipe, family, MemoryPlan(GIB, way, counted[way]), device):
            pipes[way] = pipe
    taken: dict[MemoryStrategy, list[float]] = {way: [] for way in pipes}
    for turn in range(repeats + 1):
        for way in pipes if turn % 2 else reversed(pipes):
            start = time.perf_counter()
            _draw(pipes[way])
            taken[way] += [time.perf_counter() - start] * (turn > 0)
    rows = []
    for way, pipe in pipes.items():
        weights = sum(
            tensor.nbytes for tensor in _weights(pipe) if tensor.device.type == device.type
        )
        peak = tensors_peak(partial(_draw, pipe), device) + weights
        rows.append(
            {
                "model": "bundled base",
                "how": str(MemoryPlan(GIB, way, 0)).partition(": ")[2].partition(";")[0],
                "time": _ratios(taken[way], taken[MemoryStrategy()]),
                "peak_mib": peak / 2**20,
                "counted_mib": counted[way] / 2**20,
            }
        )
    return rows


def _draw(pipe: Any) -> None:
    pipe("a photo of a red dog on a beach", num_inference_steps=4, output_type="pt")


def _ratios(times: Sequence[float], usual: Sequence[float]) -> str:
    return spread([a / b for a, b in zip(times, usual, strict=True)])


def _weights(pipe: Any) -> list[torch.Tensor]:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--repeats", type=int, help="turns of each backend (default: 9, quick 3)")
    flags.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    args = flags.parse_args()
    repeats = args.repeats or (3 if args.quick else 9)
    there = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if there else torch.device("cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if there else "float32"))
    with torch.no_grad():
        results = backends(device, dtype, args.quick, repeats)
        placed = ways(repeats)
    figures = {
        "largest_error": max(row["error"] for row in results if row["how"] != "sage"),
        "largest_peak_over_counted": max(row["peak_mib"] / row["counted_mib"] for row in placed),
    }
    report("attention", args, [*results, *placed], figures)


if __name__ == "__main__":
    main()
