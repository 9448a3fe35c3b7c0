"""First stage: the vision tower learns to read the parameters of drawn scenes.

As Qwen2-VL's tower, it is trained before the language model. The targets are what identities
consist of: four colours, proportions, the parameters of the markings, and the words of captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from customize.storybook.world import ACCESSORIES, BACKGROUNDS, CLASSES, PATTERNS, Identity
from storybook_training.pretrain_base import train_loop
from storybook_training.training_files import log_row, save_tensors

from . import mllm
from .render_groups import IMAGES, Groups, patches

_LABELS = (CLASSES, PATTERNS, ACCESSORIES, BACKGROUNDS)
_PROPORTIONS = ("width", "height", "head", "ear", "eye_size")


@dataclass(frozen=True, eq=False)
class Targets:
    """What the tower learns, for each group.

    Attributes:
        values: (groups, 26), float32, about -1 to 1: colours, proportions, markings.
        masks: (groups, 26), 1 where a value is visible.
        labels: (groups, images, 4), int64: class, pattern, accessory, background.
    """

    values: Tensor
    masks: Tensor
    labels: Tensor


def marking_values(identity: Identity) -> tuple[list[float], list[float]]:
    """The parameters of the markings, and which are visible: stripes have 6, spots 2."""
    rng = np.random.default_rng(identity.mark_seed)
    if identity.pattern == "striped":  # in the order of scene_drawing._markings
        slant, period = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.42)
        phase, share = rng.uniform(0, period), rng.uniform(0.36, 0.5)
        angle = 2 * np.pi * phase / period
        upright = 1.0 if rng.random() < 0.5 else -1.0
        stripes = [2 * slant, (period - 0.36) / 0.06, np.cos(angle), np.sin(angle)]
        stripes += [(share - 0.43) / 0.07, upright]
        return [*stripes, 0.0, 0.0, 0.0], [1.0] * 6 + [0.0] * 3
    if identity.pattern == "spotted":
        radius = rng.uniform(0.1, 0.16)
        step = rng.uniform(2.9, 3.4)
        spots = [(radius - 0.13) / 0.03, (step - 3.15) / 0.25, 0.0]
        return [0.0] * 6 + spots, [0.0] * 6 + [1.0, 1.0, 0.0]
    return [0.0] * 9, [0.0] * 9


def make_targets(groups: Groups) -> Targets:
    """The targets of all groups."""
    values, masks, labels = [], [], []
    for identity, accessories, backgrounds in zip(
        groups.identities, groups.accessories, groups.backgrounds, strict=True
    ):
        colours = [identity.body, identity.accent, identity.mark, identity.eye]
        rgb = [channel / 127.5 - 1 for colour in colours for channel in colour]
        proportions = [getattr(identity, name) for name in _PROPORTIONS]
        marks, visible = marking_values(identity)
        has_marks = [float(identity.pattern != "plain")] * 3
        values.append([*rgb, *proportions, *marks])
        masks.append([1.0] * 6 + has_marks + [1.0] * 3 + [1.0] * 5 + visible)
        kind, pattern = CLASSES.index(identity.kind), PATTERNS.index(identity.pattern)
        labels.append(
            [
                [kind, pattern, ACCESSORIES.index(accessory), BACKGROUNDS.index(background)]
                for accessory, background in zip(accessories, backgrounds, strict=True)
            ]
        )
    return Targets(torch.tensor(values), torch.tensor(masks), torch.tensor(labels))


class SceneHead(nn.Module):
    """Reads values and labels off the merged tokens of an image; used by this stage alone."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.sizes = [values, *map(len, _LABELS)]
        self.hidden = nn.Linear(16 * mllm.HIDDEN, 256)
        self.out = nn.Linear(256, sum(self.sizes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (images * 16, hidden) -> values (images, n), then logits of each label."""
        hidden = F.gelu(self.hidden(tokens.reshape(-1, 16 * mllm.HIDDEN)))
        return self.out(hidden).split(self.sizes, dim=1)


def scene_losses(
    head: SceneHead, visual: Any, pixels: Any, targets: Targets, group: Any, image: Any
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the root mean squared error of each value (n,)."""
    grid = torch.tensor([[1, 8, 8]]).expand(len(group), -1)
    tokens = visual(patches(pixels[group, image]), grid).pooler_output
    values, *logits = head(tokens)
    squares = (values - targets.values[group]).square() * targets.masks[group]
    loss = squares.sum() / targets.masks[group].sum()
    labels = targets.labels[group, image]
    for column, scores in enumerate(logits):
        loss = loss + 0.3 * F.cross_entropy(scores, labels[:, column])
    return loss, (squares.sum(0) / targets.masks[group].sum(0).clamp_min(1)).sqrt()


def pretrain_vision(
    folder: Path, groups: Groups, held_out: Groups, steps: int, batch: int = 96, lr: float = 2e-3
) -> None:
    """Train the tower, or resume; its averaged weights go to ``folder/tower.safetensors``."""
    torch.manual_seed(0)
    visual = mllm.make_mllm(64).visual
    targets, unseen = make_targets(groups), make_targets(held_out)
    head = SceneHead(targets.values.shape[1])

    def loss_of(generator: torch.Generator) -> Tensor:
        group = torch.randint(len(groups.identities), (batch,), generator=generator)
        image = torch.randint(IMAGES, (batch,), generator=generator)
        return scene_losses(head, visual, groups.pixels, targets, group, image)[0]

    @torch.no_grad()
    def on_checkpoint(step: int) -> None:
        save_tensors(folder / "tower.safetensors", dict(visual.state_dict()))
        group = torch.arange(min(len(held_out.identities), 128))
        image = torch.zeros(len(group), dtype=torch.int64)
        loss, errors = scene_losses(head, visual, held_out.pixels, unseen, group, image)
        names = ("body", "accent", "mark", "eye")
        rates = {name: float(errors[3 * k : 3 * k + 3].mean()) for k, name in enumerate(names)}
        rates |= {"shape": float(errors[12:17].mean()), "marks": float(errors[17:25].mean())}
        log_row(folder, stage="vision rates", step=step, loss=float(loss), **rates)

    modules = {"visual": visual, "head": head}
    train_loop("vision", folder, modules, loss_of, steps, lr, 0, on_checkpoint)
