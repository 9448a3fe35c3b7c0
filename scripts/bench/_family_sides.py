"""One side of `families.py`, in a process of its own.

Sides: "ours", this package's training loop, and "theirs", a reimplementation of the steps of a LoRA
script of diffusers: prompts are encoded once and the text encoders freed, images encoded once or at
each step, and each step waits for its loss. Both call the denoiser by the same code of the family,
so that the loops and what they train are compared.
"""

from __future__ import annotations

import io
import random
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from _common import tensors_peak
from _train_sides import CAPTION, LEARNING_RATE, Enough, Watch, _read, ours
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class WholeRun(Watch):
    """A watch that lets the run finish and save, and counts what it trained."""

    trained = 0

    def __call__(self, optimizer: Any, *arguments: Any) -> None:
        groups = optimizer.param_groups
        self.trained = sum(p.numel() for group in groups for p in group["params"])
        with suppress(Enough):
            super().__call__(optimizer, *arguments)


def theirs(job: dict[str, Any]) -> None:
    """A reimplementation of the steps of the family's script."""
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline
    from peft import LoraConfig, get_peft_model_state_dict
    from tqdm.auto import tqdm

    from customize.families import family_of

    accelerator = Accelerator(cpu=True)
    pipe = DiffusionPipeline.from_pretrained(job["base"], use_safetensors=True)
    family = family_of(pipe.components, pipe.config)
    for model in (family.denoiser, family.vae, *family.all_text_encoders.values()):
        model.requires_grad_(False)
    with torch.no_grad():
        once = family.encode_prompts([CAPTION])
    conditions = {name: rows.repeat_interleave(job["batch"], 0) for name, rows in once.items()}
    for key in family.all_text_encoders:
        family.components[key] = None
        setattr(pipe, key, None)

    denoiser, rank = family.denoiser, job["rank"]
    layers = job["layers"] or family.adapter_targets(family.denoiser_key)
    denoiser.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=list(layers),
        )
    )
    denoiser.train()
    weights = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    denoiser, optimizer, schedule = accelerator.prepare(denoiser, optimizer, schedule)

    paths = sorted(Path(job["images"]).glob("*.png"))
    encoded: dict[Path, tuple[Tensor, Tensor]] = {}

    def latents_of(path: Path) -> Tensor:
        if path not in encoded or not job["cache"]:
            with torch.no_grad():
                encoded[path] = family.encode_images(_read(path, job["resolution"])[None])
        mean, std = encoded[path]
        return (mean + std * torch.randn_like(std))[0]

    bar = tqdm(range(job["steps"]))
    for _ in bar:
        latents = torch.stack([latents_of(random.choice(paths)) for _ in range(job["batch"])])
        noise = torch.randn_like(latents)
        t = family.timesteps(torch.rand(len(latents)), latents.shape[1:])
        predicted = family.predict(family.noisy_latents(latents, noise, t), t, conditions)
        target = family.target(latents, noise, t)
        loss = torch.nn.functional.mse_loss(predicted.float(), target.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.detach().item(), lr=schedule.get_last_lr()[0])
    learned = {f"{family.denoiser_key}_lora_layers": get_peft_model_state_dict(family.denoiser)}
    type(pipe).save_lora_weights(job["output"], **learned)


SIDES = {"ours": ours, "theirs": theirs}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train once; return time, memory of the process, and what was trained and saved."""
    torch.set_num_threads(job["threads"])
    watch = WholeRun(job["steps"], job["warmup"])
    register_optimizer_step_post_hook(watch)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # of progress bars
        SIDES[job["side"]](job)
    if watch.count != job["steps"]:
        raise RuntimeError(f"the run ended after {watch.count} of {job['steps']} steps")
    saved = Path(job["output"]).rglob("*.safetensors")
    file_bytes = sum(file.stat().st_size for file in saved)
    return watch.result() | {"trained": watch.trained, "file_bytes": file_bytes}


def tensors_mib(job: dict[str, Any]) -> float:
    """The peak of a run's tensors in MiB."""
    torch.set_num_threads(job["threads"])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return tensors_peak(lambda: SIDES[job["side"]](job), torch.device("cpu")) / 2**20
