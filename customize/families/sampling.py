"""Sampling with a family's components, without a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor

from customize.families.family import Family
from customize.families.tokenization import pad_sequences


@torch.no_grad()
def sample(
    family: Family,
    conditions: Mapping[str, Tensor],
    empty: Mapping[str, Tensor],
    shape: Sequence[int],
    *,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    sampler_seed: int = 0,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Sample the latents of one picture for each row of the conditions, with guidance.

    Args:
        family: The model.
        conditions: Name -> (batch, ...), as returned by ``family.encode_prompts``.
        empty: The unconditional input with batch 1; see ``family.unconditional``. It is expanded
            to the batch and precedes the conditions in each call of the denoiser.
        shape: (channels, height, width) of the latents.
        steps: Number of sampling steps.
        guidance: Scale of classifier-free guidance in the pipeline's convention. Denoisers that
            take it as an input are called once per step.
        seeds: One seed for each picture; it determines the initial noise on every device.
        sampler_seed: Seed of schedulers that add noise at each step.
        autocast: Creates the context of the denoiser's calls.

    Returns:
        (batch, *shape), float32, on the denoiser's device.
    """
    device, count = family.denoiser.device, len(seeds)
    scheduler = family.schedule(steps, shape, device)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        extra["generator"] = Generator().manual_seed(sampler_seed)

    on_cpu: Any = {"device": "cpu", "dtype": torch.float32}
    noise = [torch.randn(*shape, generator=Generator().manual_seed(k), **on_cpu) for k in seeds]
    latents = torch.stack(noise).to(device) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    guided = family.is_guided(guidance)
    if guided:
        conditions = {
            k: pad_sequences([*empty[k].expand(count, *empty[k].shape[1:]), *v])
            for k, v in conditions.items()
        }
    for t in scheduler.timesteps:
        scaled = latents
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(latents, t)
        with autocast():
            batch = torch.cat([scaled, scaled]) if guided else scaled
            answer = family.predict(batch, t.expand(len(batch)), conditions, guidance).float()
        if guided:
            unconditional, conditional = answer.chunk(2)
            answer = family.apply_guidance(unconditional, conditional, guidance)
        latents = scheduler.step(answer, t, latents, return_dict=False, **extra)[0]
    return latents
