"""The parts of `gpu.py` that generate: attention backends, `memory=`, and calls with stages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import _gpu_steps
import torch
from _common import Row, tensors_peak
from _gpu_run import GIB, PROMPT, Run, in_turns, learned, prepared

WORDS = ("8GB", "12GB", "16GB", "24GB")


def attention(run: Run) -> Iterator[Row]:
    """Each backend alone; then denoisers with it: plain, with a concept and with `avoid=`."""
    import attention as backends

    from customize.base.attention.backends import ERROR_BOUNDS, QUANTIZED_BOUND, QUANTIZED_PREFIX

    names = [name for name in backends.SHAPES if name.startswith((*run.models, "Autoencoder"))]
    shapes = {name: backends.SHAPES[name] for name in names}
    right = {"native"}
    for row in backends.backends(run.device, run.dtype, run.tiny, run.repeats, shapes):
        bound = QUANTIZED_BOUND if QUANTIZED_PREFIX in row["how"] else ERROR_BOUNDS[run.dtype]
        fits = row["error"] <= bound
        if fits:
            right.add(row["how"])
        yield {
            "model": row["model"],
            "what": f"attention of {row['heads']}, {row['tokens']} tokens: {row['how']}",
            "ratio": row["time"],
            "peak_gib": row["peak_mib"] / 1024,
            "error": row["error"],
            "note": "" if fits else f"wrong: the bound is {bound:g}",
        }
    for model in run.models:
        pipe = run.make(model)
        (concept,) = learned(run, model, pipe, 1)
        ways = {"as diffusers loads it": (pipe.unload_custom, partial(run.draw, pipe))}
        for name in sorted(right & {"native", "_native_cudnn", "xformers", "flash", "_flash_3"}):
            for what, sources, call in (
                ("", (), {}),
                (", a concept", (concept,), {}),
                (", a concept, avoid=", (concept,), {"avoid": "fence"}),
            ):
                prepare = partial(prepared, pipe, *sources, attention=name)
                prompt = PROMPT.replace("a dog", "<rex0>") if sources else PROMPT
                ways[f"attention={name}{what}"] = (
                    prepare,
                    partial(run.draw, pipe, prompt=prompt, **call),
                )
        for row in in_turns(run, ways, "as diffusers loads it"):
            yield {"model": model, **row, "what": f"4 steps, {row['what']}"}
        del pipe, ways
        run.empty()


def memory(run: Run) -> Iterator[Row]:
    """`memory=`: the peak of one image and the plan's estimate, on a device limited to that size.

    Then each preset of SDXL and FLUX.1: the peak of three training steps and its estimate.
    """
    from customize.errors import CustomizeError

    host = torch.device("cpu")
    for model in run.models:
        for word in ("1GB",) if run.tiny else WORDS:
            pipe = run.make(model, host)
            row: dict[str, Any] = {"model": model, "what": f'memory="{word}"'}
            limit_memory(run, word)
            try:
                pipe.load_custom(memory=word)
                resident = sum(t.nbytes for t in _tensors(pipe) if t.device.type == run.device.type)
                draw = partial(run.draw, pipe, 2, output_type="pt")
                peak = resident + tensors_peak(draw, run.device)
                row |= {"seconds": run.seconds(draw), "peak_gib": peak / GIB}
                plan = pipe.custom.memory
                rows = re.search(r"([\d.]+) GB needed", plan)
                row |= {"counted_gib": float(rows[1]) if rows else None, "note": plan}
            except (CustomizeError, torch.OutOfMemoryError) as error:
                row["note"] = str(error).splitlines()[0]
            limit_memory(run, None)
            yield row
            del pipe
            run.empty()
    yield from _gpu_steps.presets(run)


def limit_memory(run: Run, word: str | None) -> None:
    """Limit torch to the memory of a card of this size; None: no limit."""
    from customize.base.memory_plan import RESERVED_BYTES, parse_memory_size

    if run.device.type != "cuda":
        return
    whole = torch.cuda.get_device_properties(run.device).total_memory
    share = 1.0 if word is None else min((parse_memory_size(word) - RESERVED_BYTES) / whole, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, run.device)


def _tensors(pipe: Any) -> list[torch.Tensor]:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def calls(run: Run) -> Iterator[Row]:
    """`pipe(...)` with stages against without, 4 steps."""
    for model in run.models:
        pipe = run.make(model)
        first, second = learned(run, model, pipe, 2)
        library = first.parent
        prompt = "a photo of <rex0> and <rex1> on a beach"
        halves = {"<rex0>": (0, 0, 0.5, 1), "<rex1>": (0.5, 0, 1, 1)}
        one = partial(prepared, pipe, first)
        both = partial(prepared, pipe, first, second)
        draw = partial(run.draw, pipe)
        ways = {
            "no concept": (pipe.unload_custom, draw),
            "a concept": (one, partial(draw, prompt=PROMPT.replace("a dog", "<rex0>"))),
            "two concepts": (both, partial(draw, prompt=prompt, together=False)),
            "two concepts, together=": (both, partial(draw, prompt=prompt, together=True)),
            "two concepts, avoid=": (
                both,
                partial(draw, prompt=prompt, avoid="fence", together=False),
            ),
            "two concepts, regions=": (both, partial(draw, prompt=prompt, regions=halves)),
            "a library": (
                partial(prepared, pipe, library=library),
                partial(draw, prompt=prompt, together=False),
            ),
        }
        for row in in_turns(run, ways, "no concept"):
            yield {"model": model, **row, "what": f"4 steps, {row['what']}"}
        del pipe, ways, one, both, draw
        run.empty()
