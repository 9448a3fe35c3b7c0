"""Train the judges of stickers on drawn scenes, measure them on held-out ones, and write them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from customize.atomic import write_atomic
from customize.core.precision import full_precision
from customize.stickers.artwork import Artwork, attribution
from customize.stickers.judges import StickerJudges
from customize.stickers.prototypes import compute_prototypes
from customize.stickers.recognition_nets import (
    CELL,
    BoxJudge,
    SceneJudge,
    SceneMaps,
    StickerJudge,
    crop_squares,
)
from customize.stickers.subjects import training_split

from .fit_judge import fit_judge, read_figures, write_judges
from .judge_data import roughen
from .measure_sticker_judges import draw_boxes, draw_nearest, measure_sticker_judges
from .sticker_judge_data import (
    SEED,
    LabelledScenes,
    judge_figures,
    label_scenes,
    random_scenes,
    round_trip_pixels,
)

#: Share of training scenes that an autoencoder encodes and decodes.
ROUND_TRIPS = 0.25
#: Scenes of a step, by what is trained.
SCENE_BATCH, BOX_BATCH, STICKER_BATCH = 64, 64, 128
# Scale of cosines and margin of the right class, as in CosFace (arXiv:1801.09414).
_SCALE, _COSINE_MARGIN = 20.0, 0.15
# Weight of the loss of the centres, which is a sum over cells.
_CENTRES = 0.1
# Errors of squares in training, by the size of the sticker: those that are embedded, and those that
# are corrected.
_SHIFT, _STRETCH = 0.1, 0.12
_WRONG_SHIFT, _WRONG_STRETCH = 0.1, 0.15


def draw_batch(
    pool: list[LabelledScenes], batch: int, generator: torch.Generator
) -> tuple[LabelledScenes, Tensor, Tensor]:
    """Choose random scenes of one width, each as often as the others.

    Returns:
        The scenes of this width, the rows chosen, and their degraded images.
    """
    counts = torch.tensor([float(len(scenes.pixels)) for scenes in pool])
    scenes = pool[int(torch.multinomial(counts, 1, generator=generator))]
    rows = torch.randint(len(scenes.pixels), (batch,), generator=generator)
    return scenes, rows, roughen(scenes.images(rows), generator, None)


def draw_stickers(
    pool: list[LabelledScenes], batch: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All stickers of random scenes.

    Returns:
        Degraded images, the index of the image of each of n stickers, its square (n, 3), its width
        and height (n, 2), and the index of its figure (n,).
    """
    scenes, rows, images = draw_batch(pool, batch, generator)
    known = scenes.figures[rows] >= 0
    index, _ = known.nonzero(as_tuple=True)
    squares, shapes, figures = (
        each[rows][known] for each in (scenes.squares, scenes.shapes, scenes.figures)
    )
    return images, index, squares, shapes, figures


def misplaced(squares: Tensor, shift: float, stretch: float, generator: torch.Generator) -> Tensor:
    """Squares (n, 3) with random errors of places and sizes, at most these shares of the size."""
    noise = 2 * torch.rand(squares.shape, generator=generator) - 1
    return squares + squares[:, 2:] * noise * torch.tensor((shift, shift, stretch))


def scene_loss(maps: SceneMaps, squares: Tensor, grounds: Tensor) -> Tensor:
    """Loss of centres (cross-entropy), squares (L1) and grounds (cross-entropy).

    Args:
        maps: Of a batch.
        squares: x, y and size of each sticker in pixels (batch, stickers, 3); size 0: none.
        grounds: Index of the colour and of the texture (batch, 2).
    """
    rows, columns = (
        (torch.arange(n, device=squares.device) + 0.5) * CELL for n in maps.centres.shape[-2:]
    )
    x, y, size = squares[..., None, None].unbind(2)
    dx, dy = columns - x, rows[:, None] - y
    there = size > 0
    # Of the size of the sticker, so that large ones have wide peaks.
    heat = torch.exp(-18 * (dx**2 + dy**2) / size.clamp(min=1) ** 2) * there
    centres = F.binary_cross_entropy_with_logits(maps.centres, heat.amax(1), reduction="sum")
    near = (torch.maximum(dx.abs(), dy.abs()) < 1.5 * CELL) & there
    predicted = maps.squares[:, None]
    errors = (
        (predicted[:, :, 0] - x).abs() / CELL
        + (predicted[:, :, 1] - y).abs() / CELL
        + 8 * (predicted[:, :, 2].clamp(min=1) / size.clamp(min=1)).log().abs()
    )
    regression = (errors * near).sum() / near.sum().clamp(min=1)
    ground = sum(
        F.cross_entropy(logits, target, label_smoothing=0.02)
        for logits, target in ((maps.colour, grounds[:, 0]), (maps.texture, grounds[:, 1]))
    )
    return _CENTRES * centres / len(squares) + regression + 2 * ground


def train_scene_judge(
    folder: Path, pool: list[LabelledScenes], steps: int, bf16: bool = False
) -> SceneJudge:
    """Train the net that finds stickers and reads grounds."""
    torch.manual_seed(SEED)
    model = SceneJudge()

    def loss_of(generator: torch.Generator) -> Tensor:
        scenes, rows, images = draw_batch(pool, SCENE_BATCH, generator)
        return scene_loss(model(images), scenes.squares[rows], scenes.grounds[rows])

    fit_judge("scenes", folder, model, loss_of, steps, 2e-3, SEED, bf16=bf16)
    return model


def train_box_judge(
    folder: Path, pool: list[LabelledScenes], steps: int, bf16: bool = False
) -> BoxJudge:
    """Train the net that corrects squares, on those of stickers with random errors."""
    torch.manual_seed(SEED + 2)
    model = BoxJudge()

    def loss_of(generator: torch.Generator) -> Tensor:
        images, index, squares, shapes, _ = draw_stickers(pool, BOX_BATCH, generator)
        start = misplaced(squares, _WRONG_SHIFT, _WRONG_STRETCH, generator)
        centre = squares[:, :2]
        true = torch.cat([centre - shapes / 2, centre + shapes / 2], 1)
        errors = (model.edges(images, index, start) - true).abs()
        return 10 * (errors / squares[:, 2:]).mean()

    fit_judge("boxes", folder, model, loss_of, steps, 2e-3, SEED + 2_000_000, bf16=bf16)
    return model


class FigureClassifier(nn.Module):
    """The embedding, and the vectors of the figures of training, which the judge does not need.

    Args:
        figures: Number of them.
    """

    def __init__(self, figures: int) -> None:
        super().__init__()
        self.judge = StickerJudge()
        width = self.judge.project.out_features
        self.embedded_figures = nn.Parameter(torch.randn(figures, width) / width**0.5)

    def loss(self, crops: Tensor, figures: Tensor) -> Tensor:
        """Cross-entropy of the cosines, of which that of the right figure has a margin."""
        vectors = self.judge(crops)
        with full_precision():
            cosines = vectors @ F.normalize(self.embedded_figures, dim=1).T
            margin = _COSINE_MARGIN * F.one_hot(figures, cosines.shape[1])
            return F.cross_entropy(_SCALE * (cosines - margin), figures)


def train_sticker_judge(
    folder: Path, pool: list[LabelledScenes], figures: int, steps: int, bf16: bool = False
) -> StickerJudge:
    """Train the embedding on the crops of all known figures.

    A figure is a subject in one hand: other hands of the subject are other figures, because a
    concept is told from both.

    Args:
        folder: Of the checkpoint and the log.
        pool: Scenes by width.
        figures: Number of figures.
        steps: Of training.
        bf16: Whether to compute in bfloat16.
    """
    torch.manual_seed(SEED + 1)
    model = FigureClassifier(figures)

    def loss_of(generator: torch.Generator) -> Tensor:
        images, index, squares, _, shown = draw_stickers(pool, STICKER_BATCH, generator)
        squares = misplaced(squares, _SHIFT, _STRETCH, generator)
        return model.loss(crop_squares(images, index, squares), shown)

    fit_judge("stickers", folder, model, loss_of, steps, 2e-3, SEED + 1_000_000, bf16=bf16)
    return model.judge


def train_sticker_judges(
    folder: Path,
    artwork: Artwork,
    vae: AutoencoderKL | None,
    pictures: int = 24_000,
    steps: int = 2_400,
    bf16: bool = False,
) -> dict[str, float]:
    """Train the judges, write them to a folder and return their held-out figures.

    Resumes an interrupted training, and only reads the figures of a finished one.

    Args:
        folder: Of checkpoints, log, sheets and results.
        artwork: All subjects but the held-out ones are learned.
        vae: Encodes and decodes a quarter of the scenes; None: none of them.
        pictures: Number of drawn scenes; the judges are measured on a sixth as many.
        steps: Of each net.
        bf16: Whether to train in bfloat16.
    """
    finished = read_figures(folder)
    if finished is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    split = training_split(artwork, "all")
    figures = judge_figures(split)
    numbers = {(subject.id, hand): k for k, (subject, hand) in enumerate(figures)}
    drawn = random_scenes(np.random.default_rng(SEED), figures, pictures)
    pool = [label_scenes(scenes, artwork, numbers) for scenes in drawn.values()]
    if vae is not None:
        for scenes in pool:
            round_trip_pixels(scenes, ROUND_TRIPS, vae, bf16)
    scene_judge = train_scene_judge(folder, pool, steps, bf16)
    box_judge = train_box_judge(folder, pool, steps, bf16)
    sticker_judge = train_sticker_judge(folder, pool, len(figures), steps, bf16)
    prototypes = compute_prototypes(sticker_judge, artwork, split.hands)
    judges = StickerJudges(scene_judge, box_judge, sticker_judge, prototypes, threshold=0.0)
    measured = measure_sticker_judges(judges, artwork, vae, pictures // 6)
    draw_boxes(judges, artwork, folder / "boxes.png")
    draw_nearest(judges, artwork, folder / "nearest.png")
    write_atomic(folder / "ATTRIBUTION.md", attribution(artwork).encode())
    save_sticker_judges(replace(judges, threshold=measured["threshold"]), folder, measured)
    return measured


def save_sticker_judges(judges: StickerJudges, folder: Path, figures: dict[str, float]) -> None:
    """Write the judges in float16 for `load_sticker_judges`, with their held-out figures."""
    prototypes = judges.prototypes
    tensors = {
        "scenes": judges.scenes.state_dict(),
        "boxes": judges.boxes.state_dict(),
        "stickers": judges.stickers.state_dict(),
        "prototypes": {"vectors": prototypes.vectors},
    }
    content = {
        "threshold": judges.threshold,
        "held_out": figures,
        "hands": prototypes.hands,
        "subjects": prototypes.subjects,
    }
    write_judges(folder, tensors, content)
