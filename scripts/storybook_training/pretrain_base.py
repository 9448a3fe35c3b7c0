"""Train the bundled base model from scratch: autoencoder, latents, then text encoder and UNet.

Each stage resumes from its last checkpoint. Step k draws its batch and noise from (seed, k), so a
resumed run is bit for bit the uninterrupted one.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from customize.core import objectives
from customize.image_tensors import images_to_tensor
from customize.storybook import bundled_models

from .base_files import load_start, save_base
from .contact_sheet import save_contact_sheet
from .muon_adamw import EMA, MuonAdamW, trapezoid
from .training_files import log_row, save_tensors
from .worlds import World


@dataclass(frozen=True)
class Preset:
    """Sizes of a run. Scenes are drawn once; captions are drawn anew at each step.

    Attributes:
        scenes: Number of square scenes; each of :data:`WIDTHS` has a quarter of it.
        two: Share of square scenes with two things.
        wide: Share of steps on wide scenes.
        sample_steps: Of the samples that each checkpoint draws.
    """

    scenes: int
    vae_steps: int
    vae_batch: int
    steps: int
    batch: int
    judge_pictures: int = 16_000
    judge_identities: int = 1_600
    judge_steps: int = 1_200
    vae_lr: float = 3e-3
    lr: float = 2e-3
    seed: int = 0
    bf16: bool = False
    two: float = 0.3
    wide: float = 0.0
    sample_steps: int = 25


#: Widths of wide scenes in pixels.
WIDTHS = (96, 128)

PRESETS = {
    "cpu": Preset(scenes=40_000, vae_steps=1_600, vae_batch=16, steps=6_000, batch=64),
    "gpu": Preset(
        scenes=400_000, vae_steps=20_000, vae_batch=64, steps=60_000, batch=256, bf16=True
    ),
    "tiny": Preset(
        scenes=96,
        vae_steps=3,
        vae_batch=4,
        steps=3,
        batch=4,
        judge_pictures=64,
        judge_identities=256,
        judge_steps=3,
        sample_steps=3,
    ),
}


def draw_tensor(world: World, scenes: list[Any]) -> torch.Tensor:
    """Draw n scenes of one width as (n, 3, 64, width) in [-1, 1]."""
    return images_to_tensor([world.draw(scene) for scene in scenes])


@contextmanager
def training_context(device: str, bf16: bool) -> Iterator[None]:
    """Autocast to bfloat16 if requested, and math attention on a CPU.

    On a CPU the backward pass of fused attention takes twice the time for heads this narrow.
    """
    kind = torch.device(device).type
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(kind, torch.bfloat16, enabled=bf16))
        if kind == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def train_loop(
    stage: str,
    folder: Path,
    modules: dict[str, nn.Module],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    steps: int,
    lr: float,
    seed: int,
    on_checkpoint: Callable[[int], None],
    every: int = 250,
    log_every: int = 25,
) -> None:
    """Train modules on `loss_of(generator)`, and leave the averaged weights in them."""
    device = next(next(iter(modules.values())).parameters()).device
    optimizer = MuonAdamW(modules, lr)
    ema = EMA(optimizer.parameters)
    state = folder / f"{stage}.safetensors"
    start = 0
    if state.exists():
        tensors = load_file(state, device=str(device))
        start = int(tensors.pop("step"))
        with torch.no_grad():
            for index, (parameter, average) in enumerate(
                zip(ema.parameters, ema.average, strict=True)
            ):
                parameter.copy_(tensors.pop(f"live.{index}"))
                average.copy_(tensors.pop(f"average.{index}"))
        optimizer.load_state_tensors(tensors)

    def checkpoint(step: int) -> None:
        tensors = {"step": torch.tensor(step)} | optimizer.state_tensors()
        tensors |= {f"live.{i}": p.detach() for i, p in enumerate(ema.parameters)}
        tensors |= {f"average.{i}": a for i, a in enumerate(ema.average)}
        save_tensors(state, tensors)
        ema.swap()
        on_checkpoint(step)
        ema.swap()

    started, recent = time.time(), []
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss = loss_of(generator)
        if not torch.isfinite(loss):
            raise RuntimeError(
                f"{stage}: loss is {loss.item()} at step {step}; lower the preset's learning rate"
                " in scripts/storybook_training/pretrain_base.py and resume"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(trapezoid(step, steps))
        ema.update(step)
        recent.append(loss.detach())
        if (step + 1) % log_every == 0:
            mean = torch.stack(recent).mean().item()
            rate = (time.time() - started) / (step + 1 - start)
            log_row(
                folder,
                stage=stage,
                step=step + 1,
                loss=mean,
                seconds=rate,
                left_min=rate * (steps - step - 1) / 60,
            )
            recent = []
        if (step + 1) % every == 0 or step + 1 == steps:
            checkpoint(step + 1)
    ema.swap()


def train_vae(
    world: World, folder: Path, preset: Preset, device: str, start: Path | None = None
) -> bundled_models.AutoencoderKL:
    """Train the autoencoder on drawn scenes: L1 of pixels and of their differences, and a small KL.

    Args:
        world: of the scenes.
        folder: for checkpoints, logs and samples.
        preset: sizes.
        device: name.
        start: base to take the initial weights from; None: random ones.
    """
    torch.manual_seed(preset.seed)
    vae = bundled_models.make_vae().to(device)
    if start is not None:
        vae.load_state_dict(
            bundled_models.AutoencoderKL.from_pretrained(start, subfolder="vae").state_dict()
        )
    # Images are reused a few times, as drawing them takes a third of a step.
    pool = draw_tensor(
        world,
        [
            world.training_scene(preset.seed + 1, k)
            for k in range(min(12_000, preset.vae_steps * preset.vae_batch))
        ],
    )
    held_out = draw_tensor(world, [world.training_scene(preset.seed + 2, k) for k in range(20)]).to(
        device
    )

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(pool), (preset.vae_batch,), generator=generator)
        x = pool[rows].to(device)
        with training_context(device, preset.bf16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded.float() - x
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return error.abs().mean() + 0.5 * edges + 1e-4 * kl

    def on_checkpoint(step: int) -> None:
        with torch.no_grad():
            decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        error = decoded - held_out
        psnr = 10 * torch.log10(4 / error.square().mean()).item()
        log_row(
            folder,
            stage="vae",
            step=step,
            held_out_l1=error.abs().mean().item(),
            held_out_psnr=psnr,
        )
        save_contact_sheet(torch.cat([held_out[:10], decoded[:10]]), folder / "vae.png")

    train_loop(
        "vae",
        folder,
        {"vae": vae},
        loss_of,
        preset.vae_steps,
        preset.vae_lr,
        preset.seed,
        on_checkpoint,
    )
    with torch.no_grad():
        means = torch.cat(
            [vae.encode(x.to(device)).latent_dist.mode() for x in pool[:512].split(64)]
        )
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return vae.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class EncodedScenes:
    """Training scenes of one width.

    Attributes:
        scenes: Their descriptions, for captions.
        latents: (scenes, 4, 16, width / 4), float16, scaled.
    """

    scenes: list[Any]
    latents: torch.Tensor


def encode_scenes(
    world: World,
    folder: Path,
    preset: Preset,
    vae: bundled_models.AutoencoderKL,
    device: str,
    width: int = 64,
) -> EncodedScenes:
    """Encode the training scenes of a width, in chunks that are cached on disk.

    The names of the chunks have a digest of the autoencoder and of what describes the scenes.
    """
    count = preset.scenes if width == 64 else -(-preset.scenes // 4)
    scenes = [world.training_scene(preset.seed, k, preset.two, width) for k in range(count)]
    described = f"{preset.seed} {preset.two} {width} {vae.config.scaling_factor}"
    described += world.fingerprint
    digest = hashlib.sha256(described.encode())
    for tensor in vae.state_dict().values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    chunks = []
    for first in range(0, count, 2_000):
        end = min(first + 2_000, count)
        path = folder / f"latents-{digest.hexdigest()[:8]}-{first:06d}-{end:06d}.safetensors"
        if not path.exists():
            with torch.no_grad():
                parts = [
                    vae.encode(x.to(device)).latent_dist.mode()
                    for x in draw_tensor(world, scenes[first:end]).split(100)
                ]
            save_tensors(path, {"latents": (torch.cat(parts) * vae.config.scaling_factor).half()})
            log_row(folder, stage="latents", width=width, scenes=end)
        chunks.append(load_file(path)["latents"])
    return EncodedScenes(scenes, torch.cat(chunks))


def train_denoiser(
    world: World,
    folder: Path,
    preset: Preset,
    vae: bundled_models.AutoencoderKL,
    device: str,
    start: Path | None = None,
) -> bundled_models.StableDiffusionPipeline:
    """Train text encoder and UNet jointly by v-prediction, low-noise steps weighted down.

    A tenth of the captions is empty, for classifier-free guidance.

    Args:
        world: of the scenes and captions.
        folder: for checkpoints, logs, samples and latents.
        preset: sizes.
        vae: trained autoencoder.
        device: name.
        start: base to take the initial weights from if there is no checkpoint; None: random ones.
    """
    widths = WIDTHS if preset.wide else ()
    square, *wide = (
        encode_scenes(world, folder, preset, vae, device, width) for width in (64, *widths)
    )
    torch.manual_seed(preset.seed)
    tokenizer = world.make_tokenizer()
    text_encoder, unet = (
        bundled_models.make_text_encoder(tokenizer).to(device),
        bundled_models.make_unet().to(device),
    )
    if start is not None:
        load_start(start, unet, text_encoder, tokenizer)
    pipe = bundled_models.make_pipeline(vae, text_encoder, tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    alphas = pipe.scheduler.alphas_cumprod.to(device)

    def loss_of(generator: torch.Generator) -> torch.Tensor:
        data = square
        if wide and float(torch.rand(1, generator=generator)) < preset.wide:
            data = wide[int(torch.randint(len(wide), (1,), generator=generator))]
        rows = torch.randint(len(data.scenes), (preset.batch,), generator=generator)
        caption_rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        captions = [
            "" if caption_rng.random() < 0.1 else world.caption(data.scenes[row], caption_rng)
            for row in rows.tolist()
        ]
        ids = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(device)
        x0 = data.latents[rows].float().to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        # Stratified timesteps, one per stratum, reduce the variance of the loss between steps.
        fractions = (
            torch.arange(preset.batch) + torch.rand(preset.batch, generator=generator)
        ) / preset.batch
        t = (fractions * len(alphas)).long().to(device)
        noisy = objectives.noisy_latents(x0, noise, alphas, t)
        with training_context(device, preset.bf16):
            predicted = unet(noisy, t, text_encoder(ids).last_hidden_state).sample.float()
        target = objectives.target("v_prediction", x0, noise, alphas, t)
        # In x0 units this is min(SNR + 1, 5); min-SNR-5 itself would not train pure noise.
        weight = (5.0 * (1 - alphas[t])).clamp(max=1.0)
        return objectives.weighted_mse(predicted, target, weight).mean()

    def on_checkpoint(step: int) -> None:
        for module in (unet, text_encoder):
            module.eval()
        images = pipe(
            list(world.sample_prompts) * 2,
            num_inference_steps=preset.sample_steps,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        save_contact_sheet(images * 2 - 1, folder / f"samples-{step:06d}.png")
        save_base(pipe, folder / "base", world.attribution)
        for module in (unet, text_encoder):
            module.train()

    modules = {"unet": unet, "text_encoder": text_encoder}
    train_loop(
        "denoiser",
        folder,
        modules,
        loss_of,
        preset.steps,
        preset.lr,
        preset.seed,
        on_checkpoint,
        every=500,
    )
    return pipe
