"""Shared by the parts of `gpu.py`: the run, timing in turns, and concepts to measure with."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import Row, spread, tensors_peak
from _gpu_models import TINY, TRUE

GIB = 2**30
PROMPT = "a photo of a dog on a beach"
#: Settings of a training that draws and records nothing but its steps.
STEPS_ALONE: dict[str, Any] = {"preserve": {}, "num_shared_directions": 0, "checkpoint_every": 0}


@dataclass(frozen=True)
class Run:
    """The settings of a part.

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
        """A new pipeline, equal at each call, created on the device in seconds."""
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
        """The seconds of a call, until the device has finished."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def draw(self, pipe: Any, steps: int = 4, **call: Any) -> Any:
        """Generate an image of the model's default size, as latents."""
        call = {"prompt": PROMPT, "output_type": "latent"} | call
        if self.tiny:
            call |= {"height": 32, "width": 32}
        generator = torch.Generator(self.device).manual_seed(0)
        return pipe(num_inference_steps=steps, generator=generator, **call).images


def in_turns(
    run: Run, ways: Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]], usual: str
) -> Iterator[Row]:
    """A row per way: its seconds, and their ratio to the baseline's of the same turn.

    Args:
        ways: name -> the call that prepares the pipeline, and the call that is timed.
        usual: name of the baseline.
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
    """Folders of concepts trained in one run of one step, with recorded inputs for fusion."""
    from PIL import Image

    from customize.training.config import TrainConfig
    from customize.training.recipe import train_jointly

    folder = run.folder / f"{count}-concepts-{model}"
    names = [f"rex{number}" for number in range(count)]
    if not all((folder / name / "layer_inputs.safetensors").is_file() for name in names):
        pictures = run.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        for number in range(2):
            Image.effect_noise((512, 512), 60 + number).convert("RGB").save(
                pictures / f"{number}.png"
            )
        train_jointly(
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
                    steps=1,
                    mixed_precision="no" if run.dtype == torch.float32 else "bf16",
                    device=str(run.device),
                    **STEPS_ALONE,
                )
                for name in names
            ],
            components=pipe.components,
            pipeline_config=pipe.config,
            progress=False,
        )
        pipe.to(run.device)
    return [folder / name for name in names]


def prepared(pipe: Any, *sources: Any, **options: Any) -> None:
    pipe.unload_custom()
    pipe.load_custom(*sources, **options)
