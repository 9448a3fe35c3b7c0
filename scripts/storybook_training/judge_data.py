"""Training data of the judges: drawn scenes, their labels, and crops of identities."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from customize.storybook.judges import COLOUR_LABELS, HEADS, crop_thing
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import CLASSES, Scene, compose_scene, random_identity

# Disjoint from the seeds of the base model's training scenes.
SEED = 77_000


def draw_pixels(scenes: list[Scene]) -> Tensor:
    """Draw n scenes as (n, 3, 64, 64) uint8."""
    array = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def round_trip(images: Tensor, generator: torch.Generator, vae: AutoencoderKL) -> Tensor:
    """Encode and decode images (batch, 3, height, width) with some noise in the latents."""
    posterior = vae.encode(images).latent_dist
    # Up to half a standard deviation of latent noise, which samplers leave.
    strength = 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator) ** 2
    noise = torch.randn(posterior.mean.shape, generator=generator)
    latents = posterior.mean + strength * posterior.mean.std() * noise
    return vae.decode(latents).sample.to(images.dtype)


def roughen(images: Tensor, generator: torch.Generator, vae: AutoencoderKL | None) -> Tensor:
    """Add the blur, noise, tint and autoencoder loss of generated images to drawn ones.

    Args:
        images: (batch, 3, height, width) in [-1, 1].
        generator: of all random numbers.
        vae: encodes and decodes a third of the images; None: none of them.

    Returns:
        (batch, 3, height, width) in [-1, 1].
    """
    part = len(images) // 3
    if vae is not None and part:
        images = torch.cat([round_trip(images[:part], generator, vae), images[part:]])
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, uniform(-0.6, 1.0).clamp(min=0))
    images = images * uniform(0.85, 1.1) + uniform(-0.08, 0.08)
    tint = 1 + 0.06 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    images = images * tint + uniform(-0.05, 0.1).clamp(min=0) * torch.randn(
        images.shape, generator=generator
    )
    return images.clamp(-1, 1)


def labels(scene: Scene) -> dict[str, int]:
    """The target class of each head; -1 where it is undefined, as for the second thing of one."""
    targets = dict.fromkeys(HEADS, -1)
    targets["count"], targets["place"] = (
        len(scene.things) - 1,
        HEADS["place"].index(scene.background),
    )
    for slot, thing in enumerate(scene.things):
        identity = thing.identity
        targets[f"kind{slot}"] = HEADS["kind0"].index(identity.kind)
        # A hue between two colour words has no target.
        targets[f"colour{slot}"] = COLOUR_LABELS.index(identity.colour) if identity.colour else -1
        targets[f"pattern{slot}"] = HEADS["pattern0"].index(identity.pattern)
        targets[f"accessory{slot}"] = HEADS["accessory0"].index(thing.accessory)
    return targets


def identity_views(rng: np.random.Generator, count: int, views: int) -> tuple[Tensor, list[str]]:
    """Crops of random identities for contrastive training.

    Every fourth view shows the thing beside another one.

    Returns:
        Crops (count, views, 3, 64, 64) uint8, and the class of each identity.
    """
    crops, kinds = [], []
    for index in range(count):
        identity = random_identity(rng, CLASSES[index % len(CLASSES)])
        kinds.append(identity.kind)
        scenes, positions = [], []
        for view in range(views):
            if view % 4 == 3:
                other, position = random_identity(rng), ("left", "right")[int(rng.integers(2))]
                scenes.append(
                    compose_scene(
                        rng, (identity, other) if position == "left" else (other, identity)
                    )
                )
            else:
                position = "single"
                scenes.append(compose_scene(rng, (identity,)))
            positions.append(position)
        images = draw_pixels(scenes).float()
        crops.append(
            torch.cat([crop_thing(images[k : k + 1], p) for k, p in enumerate(positions)])
            .round()
            .byte()
        )
    return torch.stack(crops), kinds
