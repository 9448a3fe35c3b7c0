"""Training steps for `gpu.py`: ours, a reimplementation of diffusers' SDXL script, and presets."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Row
from _gpu_run import GIB, STEPS_ALONE, Run
from torch.optim.optimizer import register_optimizer_step_post_hook

RANK = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Enough(BaseException):
    """Ends a run after its last step; a BaseException, so that no handler of the run catches it."""


def stepped(run: Run, call: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Median seconds of a step after the second, and peak GiB on the device (0 on a CPU)."""
    times: list[float] = []

    def after_step(*_: Any) -> None:
        run.wait()
        times.append(time.perf_counter())
        if len(times) == steps:
            raise Enough

    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    hook = register_optimizer_step_post_hook(after_step)
    try:
        call()
    except Enough:
        pass
    finally:
        hook.remove()
    if len(times) < steps:
        raise RuntimeError(f"the training ended after {len(times)} of {steps} steps")
    peak = torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else 0
    return statistics.median(b - a for a, b in pairwise(times[1:])), peak / GIB


def training(run: Run) -> Iterator[Row]:
    """Steps of SDXL at batch 1: ours and theirs, plain, in 4 bits, compiled."""
    steps = 4 if run.tiny else 12
    kinds = ["plain", "quantize nf4", "compile"]
    theirs: dict[str, tuple[float, float]] = {}
    for kind in kinds:
        if kind == "quantize nf4" and find_spec("bitsandbytes") is None:
            yield {
                "model": "SDXL",
                "what": f"step, {kind}",
                "note": "bitsandbytes is not installed",
            }
            continue
        for side, train in (("theirs", their_loop), ("ours", our_loop)):
            pipe = run.make("SDXL")
            if kind == "quantize nf4":
                quantized(run, pipe, "nf4")
            try:
                seconds, peak = stepped(
                    run, lambda p=pipe, t=train, k=kind: t(run, p, steps, k == "compile"), steps
                )
            except Exception as error:  # one side's failure leaves the others' rows
                yield {"model": "SDXL", "what": f"step, {kind}, {side}", "note": _first(error)}
                continue
            finally:
                del pipe
                run.empty()
            if side == "theirs":
                theirs[kind] = seconds, peak
            row = {"model": "SDXL", "what": f"step, {kind}, {side}", "seconds": seconds}
            if kind in theirs:
                row["ratio"] = f"{seconds / theirs[kind][0]:.3f}"
            yield row | ({"peak_gib": peak} if peak else {})


def quantized(run: Run, pipe: Any, kind: Any) -> None:
    """Quantize the denoiser, as `--quantize` does."""
    from customize.base.quantization import quantize_model
    from customize.families import family_of

    for denoiser in family_of(pipe.components, pipe.config).denoisers.values():
        quantize_model(denoiser, kind, run.dtype, run.device)
    run.empty()


def pictures(folder: Path, side: int, count: int = 4) -> Path:
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        Image.effect_noise((side, side), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return folder


def our_loop(run: Run, pipe: Any, steps: int, compile_: bool) -> None:
    """This package's loop with the layers, rank and batch size of theirs."""
    side = 32 if run.tiny else 1024
    settings = {
        "method": "lora",
        "rank": 4 if run.tiny else RANK,
        "train_text_encoder": False,
        "train_tokens": False,
        "steps": steps,
        "batch_size": 1,
        "compile": compile_,
        **STEPS_ALONE,
    }
    _train(run, pipe, side, settings)


def _train(run: Run, pipe: Any, side: int, settings: dict[str, Any]) -> None:
    from customize.training.config import TrainConfig
    from customize.training.recipe import train

    with tempfile.TemporaryDirectory() as name:
        config = {
            "base": "random weights",
            "images": pictures(Path(name) / "pictures", side),
            "output": Path(name) / "rex",
            "name": "rex",
            "class_word": "dog",
            "resolution": side,
            "checkpoint_every": 0,
            "record_inputs": False,
            "mixed_precision": "no" if run.dtype == torch.float32 else "bf16",
            "device": str(run.device),
        }
        train(
            TrainConfig(**config | settings),
            components=pipe.components,
            pipeline_config=pipe.config,
            progress=False,
        )


def their_loop(run: Run, pipe: Any, steps: int, compile_: bool) -> None:
    """A reimplementation of the steps of diffusers' train_dreambooth_lora_sdxl.py.

    The caption is encoded once; the image is read, transformed and encoded by the autoencoder, in
    float32, at each step; the adapter is float32 and the other computation under autocast. The
    script has no flag to compile; its UNet is compiled here by `compile_repeated_blocks`.
    """
    import numpy as np
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from PIL import Image

    side = 32 if run.tiny else 1024
    precision = "no" if run.dtype == torch.float32 else "bf16"
    accelerator = Accelerator(mixed_precision=precision, cpu=run.device.type == "cpu")
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    unet, vae = pipe.unet, pipe.vae.to(torch.float32)
    with torch.no_grad():
        prompt, _, pooled, _ = pipe.encode_prompt(
            "a photo of a dog", device=run.device, do_classifier_free_guidance=False
        )
    pipe.text_encoder = pipe.text_encoder_2 = None
    run.empty()
    for model in (unet, vae):
        model.requires_grad_(False)
    rank = 4 if run.tiny else RANK
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    cast_training_params(unet, dtype=torch.float32)
    unet.train()
    if compile_:
        unet.compile_repeated_blocks()
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ids = torch.tensor([[side, side, 0, 0, side, side]], device=run.device, dtype=prompt.dtype)
    with tempfile.TemporaryDirectory() as name:
        paths = sorted(pictures(Path(name) / "pictures", side).iterdir())
        for step in range(steps):
            with Image.open(paths[step % len(paths)]) as image:
                array = np.array(image.convert("RGB"))
            pixels = torch.from_numpy(array).permute(2, 0, 1)[None].to(run.device).float()
            latents = vae.encode(pixels / 127.5 - 1).latent_dist.sample()
            latents = (latents * vae.config.scaling_factor).to(prompt.dtype)
            noise = torch.randn_like(latents)
            t = torch.randint(0, noising.config.num_train_timesteps, (1,), device=run.device)
            with accelerator.autocast():
                predicted = unet(
                    noising.add_noise(latents, noise, t),
                    t,
                    prompt,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
                    return_dict=False,
                )[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.detach().item()  # the script shows it at each step


def presets(run: Run) -> Iterator[Row]:
    """The peak of three steps with each preset's settings, and the estimate in its file."""
    from customize.training.settings_file import read_yaml

    models = {"sdxl": "SDXL", "flux": "FLUX.1"}
    for path in sorted((ROOT / "scripts/presets").glob("*.yaml")):
        model = models.get(path.stem.rpartition("-")[0])
        if model is None:
            continue
        row: dict[str, Any] = {"model": model, "what": f"3 steps of {path.name}"}
        counted = re.search(r"^# Counted: ([\d.]+) GB, with 1 GB", path.read_text(), re.MULTILINE)
        if counted is None:
            raise RuntimeError(f"{path.name} counts no memory")
        settings = read_yaml(path)
        kind = settings.pop("quantize", "none")
        library = "torchao" if kind.startswith("torchao") else "bitsandbytes"
        if kind != "none" and find_spec(library) is None:
            yield row | {"note": f"{library} is not installed"}
            continue
        # One after another: the base is loaded on the CPU, then quantized on the device.
        pipe = run.make(model)
        if kind != "none":
            quantized(run, pipe, kind)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to("cpu")
        pipe.vae.to(torch.float32)
        run.empty()
        if run.tiny:
            settings |= {"rank": 4, "num_shared_directions": 0}
        side = settings.pop("resolution", None) or 1024
        try:
            seconds, peak = stepped(
                run,
                lambda p=pipe, s=side, settings_used=settings: _train(
                    run, p, 32 if run.tiny else s, settings_used | {"steps": 3}
                ),
                3,
            )
            row |= {"seconds": seconds} | ({"peak_gib": peak} if peak else {})
            row |= {"counted_gib": float(counted[1]) - 1}
        except Exception as error:
            row["note"] = _first(error)
        yield row
        del pipe
        run.empty()


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
