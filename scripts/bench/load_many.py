"""Load many LoRA files into one pipeline: `load_custom` against diffusers' `load_lora_weights`.

The transformer has FLUX.1's 19 and 38 blocks, so as many layers change as in the real model (the
418 projections of its attentions and feed-forwards), at 1/24 of the width: this measures the work
per layer and file, not the copying of large weights. Prompts are not encoded; the other components
are the tests' tiny ones.

Ours is one call with all files, which are merged into one adapter. Theirs is a call of
`load_lora_weights` per file and one of `set_adapters` with the same weights. Each run is a process
of its own, forked from this one after files were loaded both ways; sides take turns. Both outputs
for the same input must agree. Time is the CPU time of one thread, which other load affects little;
`clock_s` is wall-clock time. `load_speedup_N` is the median over turns of theirs over ours; with 50
files there is one turn.

`answer_s` is one call of the transformer. At this width the merged adapter, of rank 4 N, is as wide
as its layers for N = 32, unlike in the real model.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, apart, parser, report, spread
from torch import Tensor, nn

sys.path.insert(0, str(ROOT))

HEADS, HEAD_WIDTH, RANK = 8, 16, 4
BLOCKS, SINGLE_BLOCKS = 19, 38
CHANGED = re.compile(
    r"transformer_blocks\.\d+\.(attn|ff|ff_context)\..+"
    r"|single_transformer_blocks\.\d+\.(attn\..+|proj_mlp|proj_out)"
)
#: Files -> runs of each side; theirs takes minutes to load fifty.
REPEATS = {1: 5, 10: 3, 50: 1}
#: How far apart the two sides' answers may be, as a share of what the LoRAs change in them.
TOLERANCE = 1e-3


def make_pipeline(blocks: int, single_blocks: int) -> Any:
    """A FLUX.1 pipeline with a narrow transformer of so many blocks."""
    from diffusers import FluxTransformer2DModel

    from tests.tiny import tiny_flux

    pipe = tiny_flux()
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks,
        num_single_layers=single_blocks,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=48,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipe.register_modules(transformer=transformer.eval())
    return pipe


def write_loras(pipe: Any, folder: Path, count: int) -> list[Path]:
    """Write LoRAs of the same layers, with diffusers' keys."""
    from safetensors.torch import save_file

    layers = {
        name: module
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, nn.Linear) and CHANGED.fullmatch(name)
    }
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, layer in layers.items():
            down = torch.randn(RANK, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, RANK, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = down / layer.in_features**0.5
            tensors[f"transformer.{name}.lora_B.weight"] = 0.1 * up
        paths.append(folder / f"lora{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


@torch.no_grad()
def answer(pipe: Any) -> Tensor:
    """The output of the transformer for one input."""
    generator = torch.Generator().manual_seed(0)
    tokens, words = 16, 8
    results: Tensor = pipe.transformer(
        hidden_states=torch.randn(1, tokens, 16, generator=generator),
        encoder_hidden_states=torch.randn(1, words, 48, generator=generator),
        pooled_projections=torch.randn(1, 16, generator=generator),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=torch.cartesian_prod(*map(torch.arange, (1.0, 4.0, 4.0))),
        txt_ids=torch.zeros(words, 3),
        return_dict=False,
    )[0]
    return results


def ours(pipe: Any, paths: list[Path], weights: list[float]) -> None:
    pipe.load_custom(*paths, weights=weights)


def theirs(pipe: Any, paths: list[Path], weights: list[float]) -> None:
    names = [path.stem for path in paths]
    for path, name in zip(paths, names, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(names, weights)


SIDES = {"ours": ours, "theirs": theirs}


def run(pipe: Any, side: str, paths: list[Path]) -> dict[str, Any]:
    """Load the files once; return the time and the model's output."""
    weights = [1 / len(paths)] * len(paths)
    wall, cpu = time.perf_counter(), time.process_time()
    SIDES[side](pipe, paths, weights)
    results = {"load_s": time.process_time() - cpu, "clock_s": time.perf_counter() - wall}
    answer_before = answer(pipe)
    cpu = time.process_time()
    answer(pipe)
    return {**results, "answer_s": time.process_time() - cpu, "given": answer_before.tolist()}


def compare(pipe: Any, paths: list[Path], turns: int) -> list[dict[str, Any]]:
    """Both sides in turns, a row per side."""
    base = answer(pipe)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in list(SIDES)[:: 1 if turn % 2 else -1]:
            runs[side].append(apart(partial(run, pipe, side, paths)))
    first, second = (torch.tensor(runs[side][0]["given"]) for side in SIDES)
    change = float((second - base).abs().max())
    difference = float((first - second).abs().max()) / change
    if not difference <= TOLERANCE:
        raise SystemExit(f"with {len(paths)} files the sides' answers differ by {difference:.2g}")
    speedups = [a["load_s"] / b["load_s"] for a, b in zip(*runs.values(), strict=True)]
    return [
        {
            "files": len(paths),
            "side": side,
            "load_s": spread([single_run["load_s"] for single_run in results]),
            "clock_s": statistics.median(single_run["clock_s"] for single_run in results),
            "answer_s": statistics.median(single_run["answer_s"] for single_run in results),
            **(
                {"speedup": statistics.median(1 / single_run for single_run in speedups)}
                if side == "ours"
                else {"difference": difference}
            ),
        }
        for side, results in runs.items()
    ]


def main() -> None:
    from diffusers.utils import logging

    import customize  # noqa: F401  so that pipelines have load_custom

    flags = parser(__doc__)
    args = flags.parse_args()
    repeats = {1: 1, 10: 1} if args.quick else REPEATS
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # theirs warns that files have no text encoder layers
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for side in SIDES:  # imports at the first use
            small = make_pipeline(1, 1)
            (folder := Path(name) / side).mkdir()
            SIDES[side](small, write_loras(small, folder, 2), [0.5, 0.5])
        pipe = make_pipeline(BLOCKS, SINGLE_BLOCKS)
        paths = write_loras(pipe, Path(name), max(repeats))
        for count, turns in repeats.items():
            rows += compare(pipe, paths[:count], turns)
    figures = {f"load_speedup_{row['files']}": row["speedup"] for row in rows if "speedup" in row}
    report("load_many", args, rows, figures)


if __name__ == "__main__":
    main()
