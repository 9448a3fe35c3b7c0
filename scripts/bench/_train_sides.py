"""One side of `train_step.py`, in a process of its own: `_train_sides.py JSON`.

Sides: "ours", this package's training loop; "script", a DreamBooth LoRA script given by its path;
and "loop", a reimplementation of the steps of diffusers' DreamBooth LoRA example: the image is
read, transformed and encoded by the autoencoder at each step, the caption once, or at each step if
the text encoder trains, and each step waits for its loss.

Time and memory are measured by a hook after the optimizer step, the same for all sides. The last
line printed is a JSON object.
"""

from __future__ import annotations

import importlib.util
import json
import random
import runpy
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
DENOISER_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LEARNING_RATE = 1e-4
CAPTION = "a photo of <rex>"


class Enough(BaseException):
    """Ends a run after its last step; a BaseException, so that no handler of the run catches it."""


@dataclass
class Watch:
    """Measures the time of each optimizer step, and ends the run after the last."""

    steps: int
    warmup: int
    started: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    count: int = 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count in (1, self.warmup, self.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        self.cpu_times.append(time.process_time())
        if self.count == self.steps:
            raise Enough

    def result(self) -> dict[str, float]:
        first, counted = self.warmup - 1, self.steps - self.warmup
        return {
            "step_s": (self.times[-1] - self.times[first]) / counted,
            "step_cpu_s": (self.cpu_times[-1] - self.cpu_times[first]) / counted,
            "first_step_after_s": self.times[0] - self.began,
            "peak_mib": _peak() / 2**20,
        }


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        # Not getrusage: on Linux that starts at what the parent process held.
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def ours(job: dict[str, Any]) -> None:
    """This package's loop, with the trained layers of the example and without token embeddings."""
    from customize.training.config import TrainConfig
    from customize.training.recipe import train

    config = TrainConfig(
        base=job["base"],
        images=Path(job["images"]),
        output=Path(job["output"]) / "rex",
        name="rex",
        class_word="dog",
        resolution=job["resolution"],
        method=job["method"],
        rank=job["rank"],
        train_text_encoder=job["text"],
        train_tokens=False,
        steps=job["steps"],
        batch_size=job["batch"],
        learning_rate=LEARNING_RATE,
        text_learning_rate=LEARNING_RATE,
        checkpoint_every=0,
        device=job["device"],
        preserve={},
        # It draws for these before the first step and after the last, which a step has no part in.
        num_shared_directions=0,
        record_inputs=False,
    )
    train(config, progress=True)


def script(job: dict[str, Any]) -> None:
    """The example itself, with its fastest flags."""
    flags = {
        "pretrained_model_name_or_path": job["base"],
        "instance_data_dir": job["images"],
        "instance_prompt": CAPTION,
        "output_dir": job["output"],
        "resolution": job["resolution"],
        "rank": job["rank"],
        "train_batch_size": job["batch"],
        "max_train_steps": job["steps"],
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": 10**9,
        "seed": 0,
    }
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    words.append("--train_text_encoder" if job["text"] else "--pre_compute_text_embeddings")
    _need_transforms()
    if job["device"] == "cpu":
        # The only way to tell accelerate from within.
        import os

        os.environ["ACCELERATE_USE_CPU"] = "true"
    sys.argv = [job["script"], *words]
    runpy.run_path(job["script"], run_name="__main__")


def loop(job: dict[str, Any]) -> None:
    """A reimplementation of the example's steps."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from tqdm.auto import tqdm
    from transformers import CLIPTextModel, CLIPTokenizer

    accelerator = Accelerator(cpu=job["device"] == "cpu")
    device, base = accelerator.device, job["base"]
    noising = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").to(device)
    text_encoder: Any = CLIPTextModel.from_pretrained(
        base, subfolder="text_encoder", dtype=torch.float32
    ).to(device)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").to(device)
    trained = [(unet, DENOISER_TARGETS)] + [(text_encoder, TEXT_TARGETS)] * job["text"]
    for model in (vae, text_encoder, unet):
        model.requires_grad_(False)
    for model, targets in trained:
        rank = job["rank"]
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        model.train()
    weights = [p for model, _ in trained for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-2)

    def encode() -> Tensor:
        ids = tokenizer(
            [CAPTION], padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.repeat(job["batch"], 1)
        return text_encoder(ids.to(device))[0]

    if not job["text"]:
        with torch.no_grad():
            condition = encode()
        del text_encoder
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    paths = sorted(Path(job["images"]).glob("*.png"))
    bar = tqdm(range(job["steps"]))
    for _ in bar:
        pixels = torch.stack(
            [_read(random.choice(paths), job["resolution"]) for _ in range(job["batch"])]
        ).to(device)
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, noising.config.num_train_timesteps, (len(latents),), device=device)
        noisy = noising.add_noise(latents, noise, t)
        predicted = unet(noisy, t, encode() if job["text"] else condition, return_dict=False)[0]
        epsilon = noising.config.prediction_type == "epsilon"
        target = noise if epsilon else noising.get_velocity(latents, noise, t)
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.detach().item(), lr=schedule.get_last_lr()[0])


def _read(path: Path, side: int) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return _to_tensor(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))


def _to_tensor(image: Any) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _need_transforms() -> None:
    """A substitute for torchvision's image transforms if torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.utils import is_torchvision_available

    # Both libraries look for torchvision once and remember: before there is a stand-in to find.
    is_torchvision_available()
    importlib.import_module("diffusers.utils.import_utils")
    from enum import Enum

    from PIL import Image

    mode = Enum("InterpolationMode", {m.name: m.name.lower() for m in Image.Resampling})

    def resize(size: int, interpolation: Any) -> Callable[[Any], Any]:
        def scaled(image: Any) -> Any:
            factor = size / min(image.size)
            shape = tuple(round(side * factor) for side in image.size)
            return image.resize(shape, Image.Resampling[interpolation.name])

        return scaled

    def crop(size: int) -> Callable[[Any], Any]:
        def cut(image: Any) -> Any:
            left, top = (random.randint(0, side - size) for side in image.size)
            return image.crop((left, top, left + size, top + size))

        return cut

    def compose(parts: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def run(image: Any) -> Any:
            for part in parts:
                image = part(image)
            return image

        return run

    transforms = types.ModuleType("torchvision.transforms")
    transforms.__dict__.update(
        InterpolationMode=mode,
        Resize=resize,
        CenterCrop=crop,
        RandomCrop=crop,
        ToTensor=lambda: lambda image: (_to_tensor(image) + 1) / 2,
        Normalize=lambda mean, std: lambda x: (x - mean[0]) / std[0],
        Compose=compose,
    )
    package = types.ModuleType("torchvision")
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


SIDES = {"ours": ours, "script": script, "loop": loop}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    watch = Watch(job["steps"], job["warmup"])
    register_optimizer_step_post_hook(watch)
    try:
        SIDES[job["side"]](job)
    except Enough:
        print(json.dumps(watch.result()))
        return
    raise SystemExit(f"the run ended after {watch.count} of {job['steps']} steps")


if __name__ == "__main__":
    main()
