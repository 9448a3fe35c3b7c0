"""The parts of `gpu.py`: each is a function from a run to rows, with one entry in :data:`PARTS`.

A part makes its models, measures, and yields a row as soon as it has one, so that what was measured
before a crash or the end of the time is kept.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _gpu_steps
import torch
from _common import Row, spread, tensors_peak
from _gpu_models import TINY, TRUE

GIB = 2**30
PROMPT = "a photo of a dog on a beach"
WORDS = ("8GB", "12GB", "16GB", "24GB")


@dataclass(frozen=True)
class Run:
    """What a part gets.

    Attributes:
        tiny: the tests' tiny models instead of true sizes.
        quick: fewer repeats.
        folder: for files; parts of one run share it.
        end: the value of ``time.monotonic()`` at which the part has to be done.
    """

    device: torch.device
    dtype: torch.dtype
    tiny: bool
    quick: bool
    folder: Path
    end: float

    @property
    def models(self) -> Mapping[str, Callable[[torch.device, torch.dtype], Any]]:
        return TINY if self.tiny else TRUE

    @property
    def repeats(self) -> int:
        return 1 if self.tiny else 3 if self.quick else 5

    def make(self, model: str, where: torch.device | None = None) -> Any:
        """A new pipeline, equal at each call. On the device it is made in seconds."""
        pipe = self.models[model](self.device, self.dtype)
        if where is not None and where != self.device:
            pipe.to(where)
            self.empty()
        return pipe

    def empty(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long a call takes, until the device is done."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def draw(self, pipe: Any, steps: int = 4, **call: Any) -> Any:
        """A picture of the model's default size, as latents."""
        call = {"prompt": PROMPT, "output_type": "latent"} | call
        if self.tiny:
            call |= {"height": 32, "width": 32}
        generator = torch.Generator(self.device).manual_seed(0)
        return pipe(num_inference_steps=steps, generator=generator, **call).images


def in_turns(
    run: Run, ways: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], usual: str
) -> Iterator[Row]:
    """A row for each way: its seconds, and their ratio to the usual way's of the same turn.

    Args:
        ways: name -> what brings the pipeline into this state, and what is timed.
        usual: the way that others are compared with.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = {}
    for turn in range(run.repeats + 1):
        for name in ways if turn % 2 else reversed(ways):
            prepare, call = ways[name]
            prepare()
            if not turn:  # warms up, and is not timed
                peaks[name] = tensors_peak(call, run.device)
            else:
                taken[name].append(run.seconds(call))
    for name, times in taken.items():
        yield {
            "what": name,
            "seconds": statistics.median(times),
            "ratio": spread([a / b for a, b in zip(times, taken[usual], strict=True)]),
            "peak_gib": peaks[name] / GIB,
        }


def learned(run: Run, model: str, pipe: Any, count: int) -> list[Path]:
    """Folders of concepts that were learned in one run of one step, with records for fusion."""
    from PIL import Image

    from customize.training.config import TrainConfig
    from customize.training.loop import train_together

    folder = run.folder / f"concepts-{model}"
    names = [f"rex{number}" for number in range(count)]
    if not all((folder / name / "layer_inputs.safetensors").is_file() for name in names):
        pictures = run.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        for number in range(2):
            Image.effect_noise((512, 512), 60 + number).convert("RGB").save(
                pictures / f"{number}.png"
            )
        train_together(
            [
                TrainConfig(
                    base=model,
                    images=pictures,
                    output=folder / name,
                    name=name,
                    class_word="dog",
                    library=folder,
                    resolution=32 if run.tiny else 512,
                    rank=2 if run.tiny else 8,
                    avoid=0,
                    preserve={},
                    steps=1,
                    checkpoint_every=0,
                    mixed_precision="no" if run.dtype == torch.float32 else "bf16",
                    device=str(run.device),
                    **_gpu_steps.NO_SAMPLES,
                )
                for name in names
            ],
            components=pipe.components,
            pipeline_config=pipe.config,
            progress=False,
        )
        pipe.to(run.device)
    return [folder / name for name in names]


def attention(run: Run) -> Iterator[Row]:
    """Each backend alone; then denoisers with it, plain, with a concept and with `avoid=`."""
    import attention as backends

    from customize.attention.kernels import BOUNDS, QUANTIZED, QUANTIZED_BOUND

    names = [name for name in backends.SHAPES if name.startswith((*run.models, "Autoencoder"))]
    shapes = {name: backends.SHAPES[name] for name in names}
    right = {"native"}
    for row in backends.backends(run.device, run.dtype, run.tiny, run.repeats, shapes):
        bound = QUANTIZED_BOUND if QUANTIZED in row["how"] else BOUNDS[run.dtype]
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
                prepare = partial(_prepared, pipe, *sources, attention=name)
                prompt = PROMPT.replace("a dog", "<rex0>") if sources else PROMPT
                ways[f"attention={name}{what}"] = (
                    prepare,
                    partial(run.draw, pipe, prompt=prompt, **call),
                )
        for row in in_turns(run, ways, "as diffusers loads it"):
            yield {"model": model, **row, "what": f"4 steps, {row['what']}"}
        del pipe, ways
        run.empty()


def _prepared(pipe: Any, *sources: Any, **options: Any) -> None:
    pipe.unload_custom()
    pipe.load_custom(*sources, **options)


def memory(run: Run) -> Iterator[Row]:
    """`memory=`: the peak of one picture beside what was counted, on a device made that small.

    Then each preset of SDXL and FLUX.1: the peak of three training steps beside its counted one.
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
                held = sum(t.nbytes for t in _tensors(pipe) if t.device.type == run.device.type)
                draw = partial(run.draw, pipe, 2, output_type="pt")
                peak = held + tensors_peak(draw, run.device)
                row |= {"seconds": run.seconds(draw), "peak_gib": peak / GIB}
                plan = pipe.custom.memory
                found = re.search(r"([\d.]+) GB needed", plan)
                row |= {"counted_gib": float(found[1]) if found else None, "note": plan}
            except (CustomizeError, torch.OutOfMemoryError) as error:
                row["note"] = str(error).splitlines()[0]
            limit_memory(run, None)
            yield row
            del pipe
            run.empty()
    yield from _gpu_steps.presets(run)


def limit_memory(run: Run, word: str | None) -> None:
    """Let torch take no more of the device than a card of this size has; None: all."""
    from customize.memory import RESERVE, budget

    if run.device.type != "cuda":
        return
    whole = torch.cuda.get_device_properties(run.device).total_memory
    share = 1.0 if word is None else min((budget(word) - RESERVE) / whole, 1.0)
    torch.cuda.set_per_process_memory_fraction(share, run.device)


def _tensors(pipe: Any) -> list[torch.Tensor]:
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [each for model in models for each in (*model.parameters(), *model.buffers())]


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
    for load, switch, undo in SIDES.values():  # what is imported at the first use
        switch(pipe, load(run, pipe, paths[:1]), 0)
        undo(pipe)
    for count in counts:
        results, changed = {}, {}
        for side in ("ours", "theirs"):
            load, switch, undo = SIDES[side]
            began = time.perf_counter()
            names = load(run, pipe, paths[:count])
            run.wait()
            if names is None:
                undo(pipe)
                yield {"model": "SDXL", "what": f"{count} LoRAs, {side}", "note": "out of time"}
                continue
            loaded = time.perf_counter() - began
            switched = [run.seconds(partial(switch, pipe, names, n % count)) for n in (1, 2, 3)]
            results[side] = {"load": loaded, "switch": statistics.median(switched)}
            changed[side] = run.draw(pipe) - plain
            undo(pipe)
        for what in ("load", "switch"):
            for side, seconds in results.items():
                ratio = seconds[what] / results["theirs"][what] if "theirs" in results else None
                yield {
                    "model": "SDXL",
                    "what": f"{what} {count} LoRAs, {side}",
                    "seconds": seconds[what],
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
    """Merging concepts of SDXL by a sum and by fusion, beside and into the weights."""
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


def calls(run: Run) -> Iterator[Row]:
    """`pipe(...)` with stages against without, 4 steps."""
    for model in run.models:
        pipe = run.make(model)
        first, second = learned(run, model, pipe, 2)
        library = first.parent
        prompt = "a photo of <rex0> and <rex1> on a beach"
        halves = {"<rex0>": (0, 0, 0.5, 1), "<rex1>": (0.5, 0, 1, 1)}
        one = partial(_prepared, pipe, first)
        both = partial(_prepared, pipe, first, second)
        draw = partial(run.draw, pipe)
        ways = {
            "no concept": (pipe.unload_custom, draw),
            "a concept": (one, partial(draw, prompt=PROMPT.replace("a dog", "<rex0>"))),
            "two concepts": (both, partial(draw, prompt=prompt)),
            "two concepts, avoid=": (both, partial(draw, prompt=prompt, avoid="fence")),
            "two concepts, regions=": (both, partial(draw, prompt=prompt, regions=halves)),
            "a library": (
                partial(_prepared, pipe, library=library),
                partial(draw, prompt=prompt),
            ),
        }
        for row in in_turns(run, ways, "no concept"):
            yield {"model": model, **row, "what": f"4 steps, {row['what']}"}
        del pipe, ways, one, both, draw
        run.empty()


#: name -> part, in the order in which they run: what matters most comes first.
PARTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "training": _gpu_steps.training,
    "memory": memory,
    "attention": attention,
    "calls": calls,
    "loading": loading,
    "merging": merging,
}


def installed() -> str:
    """The optional libraries that are here."""
    names = ("bitsandbytes", "torchao", "xformers", "flash_attn", "sageattention")
    return ", ".join(name for name in names if find_spec(name)) or "none"
