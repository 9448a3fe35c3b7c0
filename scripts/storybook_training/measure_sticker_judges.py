"""Measure the judges of stickers on held-out scenes, and draw sheets to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from torch import Tensor

from customize.image_tensors import images_to_tensor
from customize.stickers.artwork import Artwork
from customize.stickers.judges import Box, StickerJudges, shared_part
from customize.stickers.prototypes import compute_prototypes, prototype_scenes
from customize.stickers.scene_drawing import draw_scene
from customize.stickers.subjects import training_split
from customize.stickers.world import Scene, Sticker, compose_scene

from .judge_data import roughen
from .measure_judges import auc, equal_error_threshold
from .sticker_judge_data import SEED, Figure, judge_figures, random_scenes

#: Sizes of stickers in pixels by which rates are given, from and below.
SIZE_BINS = ((24, 32), (32, 44), (44, 57))
LEGIBLE = 32
#: Error in pixels up to which a place or a size counts as right.
NEAR = 3.0
REFERENCES, VIEWS = 5, 6
_BATCH = 120


@dataclass(frozen=True)
class Sighting:
    """A sticker of a scene, and the box found where it is; None: it was missed."""

    sticker: Sticker
    box: Box | None


def match_boxes(scene: Scene, found: Sequence[Box]) -> list[Sighting]:
    """The found box of each sticker: that which shares most with it, if it shares a third."""
    sightings = []
    for sticker in scene.stickers:
        true = Box(sticker.left, sticker.top, sticker.size)
        best = max(found, key=lambda box: shared_part(true, box), default=None)
        hit = best is not None and shared_part(true, best) >= 1 / 3
        sightings.append(Sighting(sticker, best if hit else None))
    return sightings


def draw_images(
    scenes: Sequence[Scene],
    artwork: Artwork,
    generator: torch.Generator | None,
    vae: AutoencoderKL | None,
) -> list[Tensor]:
    """Draw scenes of one width in batches; degraded with a generator, else clean."""
    batches = []
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        images = images_to_tensor([draw_scene(scene, artwork) for scene in part])
        batches.append(images if generator is None else roughen(images, generator, vae))
    return batches


def embed_sightings(judges: StickerJudges, images: Tensor, sightings: list[Sighting]) -> Tensor:
    """Embed the sticker of each image; a missed one is the zero vector."""
    boxes = [[each.box] if each.box else [] for each in sightings]
    vectors = torch.zeros(len(images), judges.prototypes.vectors.shape[-1])
    vectors[[bool(box) for box in boxes]] = judges.embed(images, boxes)
    return vectors


def measure_scenes(
    judges: StickerJudges, artwork: Artwork, scenes: dict[int, list[Scene]], batches: list[Tensor]
) -> dict[str, float]:
    """Rates of stickers found and recognised, and of grounds read.

    A sticker that is missed counts as not recognised. The rates of subjects and hands by sizes are
    those of all stickers, the others those of stickers of at least 32 pixels.
    """
    rows: list[tuple[Sticker, float, float, str, str]] = []
    spurious, grounds = 0, []
    listed = [scene for part in scenes.values() for scene in part]
    position = 0
    for images in batches:
        part = listed[position : position + len(images)]
        position += len(images)
        found = judges.find_stickers(images)
        grounds += [
            (colour == scene.ground.colour, texture == scene.ground.texture)
            for scene, (colour, texture) in zip(part, judges.read_grounds(images), strict=True)
        ]
        matched = [match_boxes(s, boxes) for s, boxes in zip(part, found, strict=True)]
        boxes = [[each.box for each in sightings if each.box] for sightings in matched]
        recognised = iter(judges.prototypes.recognise(judges.embed(images, boxes)))
        for sightings, all_boxes in zip(matched, found, strict=True):
            spurious += len(all_boxes) - len({each.box for each in sightings if each.box})
            for sticker, box in ((each.sticker, each.box) for each in sightings):
                if box is None:
                    rows.append((sticker, np.inf, np.inf, "", ""))
                    continue
                place = float(np.hypot(*np.subtract(box.centre, sticker.centre)))
                rows.append((sticker, place, abs(box.size - sticker.size), *next(recognised)))
    return summarise(rows, artwork) | {
        "spurious_boxes": spurious / len(listed),
        "ground_colour": float(np.mean([colour for colour, _ in grounds])),
        "ground_texture": float(np.mean([texture for _, texture in grounds])),
    }


def summarise(
    rows: Sequence[tuple[Sticker, float, float, str, str]], artwork: Artwork
) -> dict[str, float]:
    """Rates of stickers.

    Args:
        rows: Sticker, error of its place and of its size in pixels, subject and hand recognised.
        artwork: Which subjects are common and held out.
    """
    sizes = np.array([sticker.size for sticker, *_ in rows])
    place, size = (np.array([row[k] for row in rows]) for k in (1, 2))
    subject = np.array([row[0].subject.id == row[3] for row in rows])
    hand = np.array([row[0].hand == row[4] for row in rows])
    common, held_out = (
        {each.id for each in subjects}
        for subjects in (training_split(artwork).training, training_split(artwork).held_out)
    )
    legible, found = sizes >= LEGIBLE, np.isfinite(place)
    figures = {
        "found": found.mean(),
        "place": (place <= NEAR).mean(),
        "size": (size <= NEAR).mean(),
    }
    if found.any():
        figures["place_error_px"] = place[found].mean()
        figures["size_error_px"] = size[found].mean()
    parts = {"": legible}
    for low, high in SIZE_BINS:
        parts[f"_{low}_{high - 1}px"] = (sizes >= low) & (sizes < high)
    for name, ids in (("common", common), ("held_out", held_out)):
        parts[f"_{name}"] = legible & np.array([row[0].subject.id in ids for row in rows])
    for name, part in parts.items():
        if part.any():
            figures[f"subject{name}"] = subject[part].mean()
            figures[f"hand{name}"] = hand[part].mean()
    return {name: float(value) for name, value in figures.items()}


def concept_distances(
    judges: StickerJudges,
    artwork: Artwork,
    concepts: Sequence[Figure],
    others: Sequence[Figure],
    vae: AutoencoderKL | None,
) -> Tensor:
    """Cosine distances of degraded images to prototypes of five clean reference images.

    Half of the images show one of the others beside the concept.

    Returns:
        (prototypes, concepts, images): of each concept's images to each concept's prototype.
    """
    rng = np.random.default_rng(SEED + 3)
    generator = torch.Generator().manual_seed(SEED + 3)
    prototypes, views = [], []
    for concept in concepts:
        references = [compose_scene(rng, [concept]) for _ in range(REFERENCES)]
        (images,) = draw_images(references, artwork, None, None)
        prototypes.append(judges.prototype(images))
        scenes = [_view(rng, concept, others, beside=k % 2 == 1) for k in range(VIEWS)]
        (images,) = draw_images(scenes, artwork, generator, vae)
        found = judges.find_stickers(images)
        sightings = [match_boxes(s, f)[0] for s, f in zip(scenes, found, strict=True)]
        views.append(embed_sightings(judges, images, sightings))
    return 1 - torch.einsum("qvd,sd->sqv", torch.stack(views), torch.stack(prototypes))


def identity_rates(distance: Tensor, subject: Tensor, hand: Tensor, of: Tensor) -> dict[str, float]:
    """How well concepts are told apart.

    A concept must be told from other subjects in its hand, which other concepts are, and from its
    subject in other hands, which a base draws for its class word. The threshold is that at which
    the rate of misses equals the rate of confusions, of both kinds in equal parts.

    Args:
        distance: From :func:`concept_distances`.
        subject: Number of the subject of each concept.
        hand: Number of the hand of each concept.
        of: Whether the rates are of this concept's prototype (concepts,).
    """
    same_subject, same_hand = subject[:, None] == subject, hand[:, None] == hand
    of = of[:, None]
    positive = distance[of & same_subject & same_hand].flatten()
    others = distance[of & same_hand & ~same_subject].flatten()
    in_hands = distance[of & same_subject & ~same_hand].flatten()
    figures = {"auc_other_subjects": auc(positive, others)}
    if len(in_hands):
        figures["auc_other_hands"] = auc(positive, in_hands)
        generator = torch.Generator().manual_seed(SEED)
        some = torch.randperm(len(others), generator=generator)[: len(in_hands)]
        others = torch.cat([others[some], in_hands])
    figures["auc"] = auc(positive, others)
    figures["threshold"] = equal_error_threshold(positive, others)
    figures["equal_error"] = (positive > figures["threshold"]).float().mean().item()
    return figures


def _view(
    rng: np.random.Generator, concept: Figure, others: Sequence[Figure], beside: bool
) -> Scene:
    """A square scene whose first sticker is the concept."""
    other = [others[int(rng.integers(len(others)))]] if beside else []
    return compose_scene(rng, [concept, *other])


def measure_sticker_judges(
    judges: StickerJudges, artwork: Artwork, vae: AutoencoderKL | None, pictures: int = 4_000
) -> dict[str, float]:
    """Measure both judges on scenes of all subjects, held-out ones too, and on held-out concepts.

    Rates of scenes have the names clean_ and rough_; those of hands that no judge was trained on,
    whose prototypes are computed here, new_hand_; those of concepts identity_.
    """
    split = training_split(artwork, "all")
    new_hands = [hand.name for hand in artwork.hands if hand.held_out]
    figures: dict[str, float] = {}
    wider = judges
    if new_hands:
        new = compute_prototypes(judges.stickers, artwork, new_hands)
        wider = replace(judges, prototypes=judges.prototypes.joined(new))
    for name, hands, degraded in (
        ("clean", split.hands, False),
        ("rough", split.hands, True),
        ("new_hand_clean", new_hands, False),
        ("new_hand_rough", new_hands, True),
    ):
        if not hands:
            continue
        drawn = [(subject, hand) for subject in artwork.subjects for hand in hands]
        scenes = random_scenes(np.random.default_rng(SEED + 2), drawn, pictures)
        generator = torch.Generator().manual_seed(SEED + 2) if degraded else None
        batches = [
            images
            for part in scenes.values()
            for images in draw_images(part, artwork, generator, vae)
        ]
        rates = measure_scenes(wider if hands is new_hands else judges, artwork, scenes, batches)
        figures |= {f"{name}_{key}": value for key, value in rates.items()}
    every_hand = (*split.hands, *new_hands)
    concepts = [(subject, hand) for subject in split.held_out for hand in every_hand]
    distance = concept_distances(judges, artwork, concepts, judge_figures(split), vae)
    number = torch.arange(len(concepts))
    subject, hand = number // len(every_hand), number % len(every_hand)
    for name, of in (
        ("identity", hand < len(split.hands)),
        ("identity_new_hand", hand >= len(split.hands)),
    ):
        if of.any():
            rates = identity_rates(distance, subject, hand, of)
            figures |= {f"{name}_{key}": value for key, value in rates.items()}
    return {"threshold": figures["identity_threshold"]} | figures


def draw_boxes(judges: StickerJudges, artwork: Artwork, path: Path, rough: bool = True) -> None:
    """Save a sheet of scenes with the boxes found, and what is recognised in them."""
    names = {subject.id: subject.name for subject in artwork.subjects}
    split = training_split(artwork, "all")
    figures = [(subject, hand) for subject in artwork.subjects for hand in split.hands]
    scenes = random_scenes(np.random.default_rng(SEED + 9), figures, 40)
    generator = torch.Generator().manual_seed(SEED + 9) if rough else None
    scale, width, columns = 3, 128 * 3 + 8, 4
    tiles = []
    for part in scenes.values():
        for images in draw_images(part, artwork, generator, None):
            for image in images.split(1):
                tiles.append(_boxes_tile(judges, image, names, scale))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * 256), "white")
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % columns * width, k // columns * 256))
    sheet.save(path)


def _boxes_tile(
    judges: StickerJudges, image: Tensor, names: dict[str, str], scale: int
) -> Image.Image:
    """One image, enlarged, with its boxes and their words below."""
    (boxes,) = judges.find_stickers(image)
    (ground,) = judges.read_grounds(image)
    recognised = judges.prototypes.recognise(judges.embed(image, [boxes]))
    pixels = ((image[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    drawn = Image.fromarray(pixels).resize((pixels.shape[1] * scale, 64 * scale), 0)
    tile = Image.new("RGB", (128 * scale, 252), "white")
    tile.paste(drawn)
    pen = ImageDraw.Draw(tile)
    lines = [" ".join(ground)]
    for box, (subject, hand) in zip(boxes, recognised, strict=True):
        corners = (box.left, box.top, box.left + box.size, box.top + box.size)
        pen.rectangle([scale * c for c in corners], outline="red")
        lines.append(f"{hand} {names[subject]}")
    pen.text((2, 64 * scale + 2), "\n".join(lines), fill="black")
    return tile


def draw_nearest(judges: StickerJudges, artwork: Artwork, path: Path, count: int = 40) -> None:
    """Save a sheet of the pairs of different subjects whose prototypes are nearest."""
    prototypes = judges.prototypes
    vectors = prototypes.vectors.flatten(0, 1)
    hands = len(prototypes.hands)
    similarity = vectors @ vectors.T
    subject = torch.arange(len(vectors)) // hands
    similarity[subject[:, None] <= subject] = -1
    subjects = {each.id: each for each in artwork.subjects}
    count = min(count, int((similarity > -1).sum()))
    sheet = Image.new("RGB", (10 * 140, -(-count // 10) * 84), "white")
    pen = ImageDraw.Draw(sheet)
    for k, index in enumerate(similarity.flatten().topk(count).indices.tolist()):
        left, top = k % 10 * 140, k // 10 * 84
        for side, row in enumerate(divmod(index, len(vectors))):
            each = subjects[prototypes.subjects[row // hands]]
            scene = prototype_scenes(each, prototypes.hands[row % hands], row)[-1]
            sheet.paste(draw_scene(scene, artwork), (left + 66 * side, top))
        distance = 1 - float(similarity.flatten()[index])
        pen.text((left, top + 66), f"{distance:.3f}", fill="black")
    sheet.save(path)
