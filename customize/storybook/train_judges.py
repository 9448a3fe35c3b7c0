"""Train the judges on renders, measure them on held-out renders, and write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from customize.atomic import write_atomic
from customize.storybook.judges import (
    COLOUR_LABELS,
    HEADS,
    AttributeJudge,
    IdentityJudge,
    Judges,
    crop_thing,
)
from customize.storybook.optimizer import MuonAdamW, trapezoid
from customize.storybook.pretrain import _log, _save
from customize.storybook.scene_drawing import draw_scene
from customize.storybook.world import CLASSES, Scene, compose_scene, random_identity, random_scene

# Another seed than anything that the base model saw.
SEED = 77_000


def roughen(images: Tensor, generator: torch.Generator, vae: AutoencoderKL | None) -> Tensor:
    """Make renders (batch, 3, 64, 64) in [-1, 1] as soft and uneven as generated pictures."""
    if vae is not None:
        part = len(images) // 3
        with torch.no_grad():
            posterior = vae.encode(images[:part]).latent_dist
            # Up to half a standard deviation of latent noise: what a sampler leaves undone.
            strength = (
                0.5 * torch.rand(part, 1, 1, 1, generator=generator) ** 2 * posterior.mean.std()
            )
            noise = torch.randn(posterior.mean.shape, generator=generator)
            images = torch.cat(
                [vae.decode(posterior.mean + strength * noise).sample, images[part:]]
            )
    count = len(images)

    def pick(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, pick(-0.6, 1.0).clamp(min=0))
    images = images * pick(0.85, 1.1) + pick(-0.08, 0.08)
    tint = 1 + 0.06 * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    images = images * tint + pick(-0.05, 0.1).clamp(min=0) * torch.randn(
        images.shape, generator=generator
    )
    return images.clamp(-1, 1)


def _pixels(scenes: list[Scene]) -> Tensor:
    array = np.stack([np.asarray(draw_scene(s)) for s in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def labels(scene: Scene) -> dict[str, int]:
    """The right answer of each head; -1 where there is nothing to say (the second thing of one)."""
    found = dict.fromkeys(HEADS, -1)
    found["count"], found["place"] = len(scene.things) - 1, HEADS["place"].index(scene.place)
    for slot, thing in enumerate(scene.things):
        who = thing.identity
        found[f"kind{slot}"] = HEADS["kind0"].index(who.kind)
        # Between two colour words there is no right answer.
        found[f"colour{slot}"] = COLOUR_LABELS.index(who.colour) if who.colour else -1
        found[f"pattern{slot}"] = HEADS["pattern0"].index(who.pattern)
        found[f"accessory{slot}"] = HEADS["accessory0"].index(thing.accessory)
    return found


def _fit(
    stage: str,
    folder: Path,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    steps: int,
    lr: float,
    every: int = 250,
) -> None:
    """Train a judge; goes on from its last checkpoint in the folder."""
    optimizer = MuonAdamW({"model": model}, lr, weight_decay=0.05)
    state, start = folder / f"{stage}-training.safetensors", 0
    if state.exists():
        tensors = load_file(state)
        start = int(tensors.pop("step"))
        model.load_state_dict({name: tensors.pop(f"model.{name}") for name in model.state_dict()})
        optimizer.load_state_tensors(tensors)
    model.train()
    total = torch.zeros(())
    for step in range(start, steps):
        loss = loss_of(torch.Generator().manual_seed(SEED + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(trapezoid(step, steps, decay=0.5))
        total += loss.detach()
        if (step + 1) % 50 == 0:
            _log(folder, stage=stage, step=step + 1, loss=total.item() / 50)
            total.zero_()
        if (step + 1) % every == 0 or step + 1 == steps:
            tensors = {"step": torch.tensor(step + 1)} | optimizer.state_tensors()
            _save(state, tensors | {f"model.{k}": v for k, v in model.state_dict().items()})
    model.eval()


def train_attributes(
    folder: Path, vae: AutoencoderKL | None, pictures: int, steps: int
) -> AttributeJudge:
    """Fit the attribute judge on `pictures` renders, half of them of two things."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    scenes = [random_scene(rng, two=0.45) for _ in range(pictures)]
    pool = _pixels(scenes)
    answers = {name: torch.tensor([labels(s)[name] for s in scenes]) for name in HEADS}
    model = AttributeJudge()

    def loss_of(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pool), (64,), generator=generator)
        logits = model(roughen(pool[rows].float() / 127.5 - 1, generator, vae))
        losses = [
            F.cross_entropy(
                logits[name], answers[name][rows], ignore_index=-1, label_smoothing=0.02
            )
            for name in HEADS
        ]
        return torch.stack(losses).mean()

    _fit("attributes", folder, model, loss_of, steps, 2e-3)
    return model


def identity_views(rng: np.random.Generator, count: int, views: int) -> tuple[Tensor, list[str]]:
    """Crops (count, views, 3, 64, 64) uint8 of `count` identities, and their classes.

    A quarter of the views shows the thing beside another one.
    """
    crops, kinds = [], []
    for k in range(count):
        who = random_identity(rng, CLASSES[k % len(CLASSES)])
        kinds.append(who.kind)
        scenes, places = [], []
        for view in range(views):
            if view % 4 == 3:
                other, where = random_identity(rng), ("left", "right")[int(rng.integers(2))]
                scenes.append(compose_scene(rng, (who, other) if where == "left" else (other, who)))
            else:
                where = "single"
                scenes.append(compose_scene(rng, (who,)))
            places.append(where)
        pictures = _pixels(scenes).float()
        crops.append(
            torch.cat([crop_thing(pictures[v : v + 1], w) for v, w in enumerate(places)])
            .round()
            .byte()
        )
    return torch.stack(crops), kinds


def train_identity(
    folder: Path, vae: AutoencoderKL | None, identities: int, steps: int
) -> IdentityJudge:
    """Supervised contrastive loss; each batch holds two classes only, so that it is hard."""
    torch.manual_seed(SEED + 1)
    crops, _ = identity_views(np.random.default_rng(SEED + 1), identities, 8)
    model = IdentityJudge()
    each, shown = 16, 4

    def loss_of(generator: torch.Generator) -> Tensor:
        kinds = torch.randperm(len(CLASSES), generator=generator)[:2]
        per_class = identities // len(CLASSES)
        rows = torch.cat(
            [
                torch.randperm(per_class, generator=generator)[:each] * len(CLASSES) + k
                for k in kinds
            ]
        )
        views = torch.stack([torch.randperm(8, generator=generator)[:shown] for _ in rows])
        batch = crops[rows[:, None], views].flatten(0, 1).float() / 127.5 - 1
        order = torch.randperm(len(batch), generator=generator)
        batch = torch.empty_like(batch).index_copy_(0, order, roughen(batch[order], generator, vae))
        vectors = model(batch)
        same = torch.arange(len(rows)).repeat_interleave(shown)
        similarity = vectors @ vectors.T / 0.1
        similarity.fill_diagonal_(float("-inf"))
        positive = (same[:, None] == same[None]) & ~torch.eye(len(same), dtype=torch.bool)
        return -similarity.log_softmax(1)[positive].mean()

    _fit("identity", folder, model, loss_of, steps, 2e-3)
    return model


def auc(positive: Tensor, negative: Tensor) -> float:
    """Chance that a random positive distance is below a random negative one."""
    order = torch.cat([positive, negative]).argsort().argsort().float() + 1
    low = len(positive) * (len(positive) + 1) / 2
    return 1 - ((order[: len(positive)].sum() - low) / (len(positive) * len(negative))).item()


def equal_error_threshold(positive: Tensor, negative: Tensor) -> float:
    """The distance at which as many positives lie above as negatives below."""
    candidates = torch.cat([positive, negative]).sort().values
    gap = [
        ((positive > c).float().mean() - (negative <= c).float().mean()).abs() for c in candidates
    ]
    return candidates[int(torch.stack(gap).argmin())].item()


@torch.no_grad()
def measure(
    judges: Judges, vae: AutoencoderKL | None, pictures: int = 1000, identities: int = 200
) -> dict[str, float]:
    """Held-out figures: attribute accuracy (clean and roughened), identity AUC and threshold.

    Strangers are of the same class only: telling a dog from a car is no test.
    """
    rng = np.random.default_rng(SEED + 2)
    scenes = [random_scene(rng, two=0.45) for _ in range(pictures)]
    clean = _pixels(scenes).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(SEED + 2)
    rough = torch.cat([roughen(part, generator, vae) for part in clean.split(120)])
    figures: dict[str, float] = {}
    for name, images in (("clean", clean), ("rough", rough)):
        logits = {k: torch.cat([judges.attributes(p)[k] for p in images.split(200)]) for k in HEADS}
        right = []
        for head in HEADS:
            answer = torch.tensor([labels(s)[head] for s in scenes])
            hit = (logits[head].argmax(1) == answer)[answer >= 0].float()
            figures[f"{name}_{head}"] = hit.mean().item()
            right.append(hit)
        figures[f"{name}_accuracy"] = torch.cat(right).mean().item()
    crops, kinds = identity_views(np.random.default_rng(SEED + 3), identities, 12)
    crops = crops.float() / 127.5 - 1
    crops[:, 6:] = torch.stack([roughen(part, generator, vae) for part in crops[:, 6:]])
    vectors = judges.identity(crops.flatten(0, 1)).view(identities, 12, -1)
    # As a concept is judged: five clean references against one picture.
    signatures = F.normalize(vectors[:, [0, 1, 2, 4, 5]].mean(1), dim=1)
    distance = 1 - torch.einsum("qvd,sd->sqv", vectors[:, 6:], signatures)
    same_class = torch.tensor([[a == b for b in kinds] for a in kinds])
    own = torch.eye(identities, dtype=torch.bool)
    positive, negative = distance[own].flatten(), distance[same_class & ~own].flatten()
    figures["identity_auc"] = auc(positive, negative)
    figures["threshold"] = equal_error_threshold(positive, negative)
    figures["equal_error"] = (positive > figures["threshold"]).float().mean().item()
    return figures


def train_judges(
    folder: Path,
    vae: AutoencoderKL | None,
    pictures: int = 16_000,
    identities: int = 1_600,
    steps: int = 2_000,
) -> dict[str, float]:
    """Train both, write them to `folder`, and return their held-out figures.

    Goes on where it was cut off; finished judges stay as they are.
    """
    if (folder / "judges.json").exists():
        found: dict[str, float] = json.loads((folder / "judges.json").read_text())["held_out"]
        return found
    folder.mkdir(parents=True, exist_ok=True)  # the losses are logged there
    judges = Judges(
        train_attributes(folder, vae, pictures, steps),
        train_identity(folder, vae, identities, steps // 2),
        threshold=0.0,
    )
    figures = measure(judges, vae)
    show_nearest(judges, folder / "nearest.png")
    save_judges(replace(judges, threshold=figures["threshold"]), folder, figures)
    return figures


def save_judges(judges: Judges, folder: Path, figures: dict[str, float]) -> None:
    """Write both judges in fp16 as `load_judges` reads them, with their held-out `figures`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in (("attributes", judges.attributes), ("identity", judges.identity)):
        halves = {
            k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()
        }
        _save(folder / f"{name}.safetensors", halves)
    info = {"threshold": judges.threshold, "held_out": figures}
    # Last, because its presence means that the files above are complete.
    write_atomic(folder / "judges.json", (json.dumps(info, indent=1) + "\n").encode())


def show_nearest(judges: Judges, path: Path) -> None:
    """A picture to look at: eight identities of one class, each with its nearest stranger."""
    crops, _ = identity_views(np.random.default_rng(SEED + 9), 64, 1)
    vectors = judges.identity(crops[:, 0].float() / 127.5 - 1)
    distance = (1 - vectors @ vectors.T).fill_diagonal_(9)
    sheet = Image.new("RGB", (16 * 66, 2 * 66), "white")
    for k in range(16):
        for row, index in enumerate((k, int(distance[k].argmin()))):
            sheet.paste(
                Image.fromarray(crops[index, 0].permute(1, 2, 0).numpy()), (k * 66, row * 66)
            )
    sheet.save(path)
