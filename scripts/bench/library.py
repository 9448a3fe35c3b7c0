"""A library of 1 to 1,000 concepts: the time of an image whose prompt names one of them.

On the bundled base, with updates of rank 8 in all of its 68 layers; concepts have random numbers,
and each is a folder as training writes it. Images are 64 x 64 pixels, in 25 steps with guidance.

Ours is `load_custom(library=)`, and each prompt names its concept. `first_s` is the time from that
call to the first image without an index, and `first_indexed_s` with one; `cold_s` is an image whose
concept was not read before, `warm_s` one whose concept is in memory while another one is attached,
so that each image switches, and `same_s` one of the same concept as before. `pair_cold_s` is an
image that names two concepts, both read before, which are fused by their recorded inputs;
`pair_warm_s` is one of two such pairs in turns, whose fusions are in memory, relative to a pipeline
with the two loaded by name. Theirs is diffusers: all LoRAs and their tokens are loaded with
`load_lora_weights` and `load_textual_inversion` (`load_s`), and `set_adapters` selects one before
each image (`warm_s`).

Ratios are to images of a pipeline with only that concept loaded by name, drawn in turns in one
process per row; `library_warm_ratio_N` is the median over turns for `warm_s`. All times are CPU
times of one thread, which other load affects little; the files are in the system's cache.
`memory_mb` is the growth of the process after 10 concepts, or for theirs after loading all. The
images of both sides must equal those of the pipeline with one concept: ours bit for bit, theirs to
a thousandth of the range.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT, apart, parser, report, spread

sys.path.insert(0, str(ROOT))

BASE = ROOT / "assets" / "storybook"
RANK, STEPS = 8, 25
OURS, THEIRS = (1, 10, 100, 1000), (1, 10, 50)
WARM = 4  # concepts that take turns; these have records
DRAWN = 10  # concepts that are drawn before memory is looked at
TURNS = 15


def open_base() -> Any:
    """The bundled base, opened in the usual way."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_concepts(folder: Path, count: int) -> None:
    """Write concepts of random updates of all layers, with two token embeddings each."""
    from customize.concepts.concept_info import BasisInfo, ConceptInfo
    from customize.concepts.input_statistics import (
        DIRECTIONS,
        LayerInputs,
        digest_updates,
        layer_inputs_path,
    )
    from customize.concepts.io.write_concept import save_concept
    from customize.concepts.slices.allocation import slice_columns
    from customize.concepts.types import Concept
    from customize.core.bases import BASES, down_projection
    from customize.core.lowrank import LowRank
    from customize.families import family_of

    family = family_of(open_base().components)
    targets = {part: family.adapter_targets(part) for part in ("unet", "text_encoder")}
    widths = {width for ours_time in targets.values() for _, width in ours_time.values()}
    tokens = family.token_dictionaries()[0].text_encoder.get_input_embeddings().weight
    fingerprint = family.fingerprint()
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        name = f"c{number}"
        columns = slice_columns(widths, RANK, index=number, name=name)
        downs = {
            w: down_projection(BASES["cosine"], w, ours_time, 0) for w, ours_time in columns.items()
        }
        info = ConceptInfo(
            name=name,
            trigger=f"<{name}>",
            class_word="dog",
            family=family.name,
            base="assets/storybook",
            fingerprint=fingerprint,
            basis=BasisInfo(),
            rank=RANK,
            alpha=RANK,
            slices={str(width): list(ours_time) for width, ours_time in columns.items()},
        )
        products = {
            part: {
                module: LowRank(
                    0.02 * torch.randn(out, RANK, generator=generator), downs[width], info.scale
                )
                for module, (out, width) in ours_time.items()
            }
            for part, ours_time in targets.items()
        }
        rows = tokens.std() * torch.randn(2, tokens.shape[1], generator=generator)
        save_concept(Concept(info, products, {"text_encoder": rows.detach()}), folder / name)
        if number < WARM:
            ours_time, generic = (
                {
                    part: {
                        module: torch.randn(DIRECTIONS, width, generator=generator) / width**0.5
                        for module, (_, width) in layers.items()
                    }
                    for part, layers in targets.items()
                }
                for _ in range(2)
            )
            record = LayerInputs(digest_updates(products), ours_time, generic)
            record.save(layer_inputs_path(folder / name))


def draw(pipe: Any, *names: str) -> np.ndarray:
    noise = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "generator": noise, "output_type": "np"}
    names_text = " and ".join(f"<{name}>" for name in names)
    return pipe(f"a photo of {names_text} on a beach", **call).images[0]


def resident() -> float:
    """The process's memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def computed(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def in_turns(
    turns: int, ours: Callable[[int], Any], alone: Callable[[], Any]
) -> tuple[list[float], list[float]]:
    """The times of a side, and each relative to the pipeline with one concept."""
    times, ratios = [], []
    for turn in range(turns):
        if turn % 2:
            other, ours_time = computed(alone), computed(partial(ours, turn))
        else:
            ours_time, other = computed(partial(ours, turn)), computed(alone)
        times.append(ours_time)
        ratios.append(ours_time / other)
    return times, ratios


def run_ours(folder: Path, turns: int) -> dict[str, Any]:
    """All measurements of a library, in a process of its own."""
    names = [f"c{number}" for number in range(len(list(folder.glob("c*"))))]
    alone = open_base().load_custom(folder / "c0")
    expected = draw(alone, "c0")
    spare, pipe = open_base(), open_base()
    before = resident()

    def first(which: Any) -> None:
        draw(which.load_custom(library=folder), "c0")

    results: dict[str, Any] = {"first_s": computed(lambda: first(spare))}
    spare.unload_custom()
    results["first_indexed_s"] = computed(lambda: first(pipe))
    if not np.array_equal(draw(pipe, "c0"), expected):
        raise SystemExit("a picture of the library's is not that of the concept by itself")
    cold = [computed(partial(draw, pipe, name)) for name in names[1:DRAWN]]
    results["memory_mb"] = resident() - before
    results["cold_s"] = spread(cold) if cold else None
    warm = names[:WARM]
    for name in warm:
        draw(pipe, name)
    times, ratios = in_turns(
        turns, lambda turn: draw(pipe, warm[turn % len(warm)]), lambda: draw(alone, "c0")
    )
    results |= {"warm_s": spread(times), "warm_ratio": statistics.median(ratios)}
    times, ratios = in_turns(turns, lambda turn: draw(pipe, warm[0]), lambda: draw(alone, "c0"))
    results |= {"same_s": spread(times), "same_ratio": statistics.median(ratios)}
    return results | (run_pairs(folder, pipe, warm, turns) if len(warm) == WARM else {})


def run_pairs(folder: Path, pipe: Any, names: list[str], turns: int) -> dict[str, Any]:
    """Images that name two concepts of the library, which are fused."""
    pairs = (names[:2], names[2:])
    alone = open_base().load_custom(*(folder / name for name in pairs[0]))
    if alone.custom.merge != "fusion":
        raise SystemExit("two concepts with records are not fused")
    cold = [computed(partial(draw, pipe, *pair)) for pair in pairs]
    if not np.array_equal(draw(pipe, *pairs[0]), draw(alone, *pairs[0])):
        raise SystemExit("a picture of two of the library's is not that of the two by themselves")
    times, ratios = in_turns(
        turns, lambda turn: draw(pipe, *pairs[turn % 2]), lambda: draw(alone, *pairs[0])
    )
    results = {"pair_cold_s": spread(cold), "pair_warm_s": spread(times)}
    return results | {"pair_warm_ratio": statistics.median(ratios)}


def run_theirs(folder: Path, count: int, turns: int) -> dict[str, Any]:
    """The same with every LoRA loaded into one pipeline."""
    alone = open_base().load_custom(folder / "c0")
    expected = draw(alone, "c0")
    pipe = open_base()
    names = [f"c{number}" for number in range(count)]
    before = resident()

    def load() -> None:
        for name in names:
            pipe.load_lora_weights(folder / name, adapter_name=name)
            pipe.load_textual_inversion(folder / name)

    def picture(name: str) -> np.ndarray:
        pipe.set_adapters([name])
        return draw(pipe, name)

    results: dict[str, Any] = {"load_s": computed(load)}
    results["memory_mb"] = resident() - before
    apart_by = float(np.abs(picture("c0") - expected).max())
    if apart_by > 1e-3:
        raise SystemExit(f"diffusers' picture of the concept differs from ours by {apart_by:.2g}")
    warm = names[:WARM]
    times, ratios = in_turns(
        turns, lambda turn: picture(warm[turn % len(warm)]), lambda: draw(alone, "c0")
    )
    return results | {"warm_s": spread(times), "warm_ratio": statistics.median(ratios)}


def main() -> None:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    import customize  # noqa: F401  so that pipelines have load_custom
    from customize.cli.base_pipeline import hide_loading_bars

    args = parser(__doc__).parse_args()
    ours, theirs, turns = (OURS[:3], THEIRS[:2], 3) if args.quick else (OURS, THEIRS, TURNS)
    torch.set_num_threads(1)
    hide_loading_bars()
    for libraries in (diffusers_logging, transformers_logging):
        libraries.set_verbosity_error()  # they warn for each LoRA without text encoder layers
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "all"
        write_concepts(whole, max(*ours, *theirs))
        draw(open_base().load_custom(whole / "c0"), "c0")  # imports at the first use
        for count in ours:
            folder = Path(name) / str(count)
            folder.mkdir()
            for number in range(count):
                (whole / f"c{number}").rename(folder / f"c{number}")
            size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 2**20
            results = apart(partial(run_ours, folder, turns))
            rows.append({"concepts": count, "side": "ours", "disk_mb": size, **results})
            for number in range(count):
                (folder / f"c{number}").rename(whole / f"c{number}")
        for count in theirs:
            results = apart(partial(run_theirs, whole, count, turns))
            rows.append({"concepts": count, "side": "diffusers", **results})
    figures = {
        f"{'library' if row['side'] == 'ours' else 'diffusers'}_warm_ratio_{row['concepts']}": row[
            "warm_ratio"
        ]
        for row in rows
    }
    figures |= {
        f"library_pair_ratio_{row['concepts']}": row["pair_warm_ratio"]
        for row in rows
        if "pair_warm_ratio" in row
    }
    report("library", args, rows, figures)


if __name__ == "__main__":
    main()
