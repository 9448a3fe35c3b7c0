"""What the judges of the storybook see in images of several things, from left to right.

Each thing has an equal part of the image's width. In 64 x 64 pixels two things have the places that
the judges were trained with; in wider images the best of several crops of a part counts, in the
sizes that the storybook draws things in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from _together.cast import SQUARE, Scene, class_of, story
from customize.storybook.caption_grammar import parse_prompt
from customize.storybook.judges import COLOUR_LABELS, CROPS, Judges, judge_inputs
from customize.storybook.world import BACKGROUNDS, CLASSES, PATTERNS

Hit = dict[str, float]

# Upper edge and side of crops of wide images, for things from a quarter of the width to all of the
# height; and the pixels between the left edges of neighbouring crops.
WIDE_CROPS = ((22, 36), (15, 46), (10, 52))
STRIDE = 6


def crops_of(images: Tensor, part: int, parts: int) -> Tensor:
    """Crop one part of images (batch, 3, 64, width): (crops, batch, 3, 64, 64)."""
    width = images.shape[-1]
    if parts == 2 and width == SQUARE[1]:
        boxes = [CROPS[("left", "right")[part]]]
    else:
        boxes = []
        for top, side in WIDE_CROPS:
            # A thing's centre is in its part.
            first, last = (round(width * (part + k) / parts) for k in (0, 1))
            edges = range(first + 8 - side // 2, last - 8 - side // 2 + 1, STRIDE)
            clipped = {min(max(edge, 0), width - side) for edge in edges}
            boxes += [(edge, top, side) for edge in sorted(clipped)]
    cut = [images[..., top : top + side, left : left + side] for left, top, side in boxes]
    return torch.stack([F.interpolate(c, (64, 64), mode="bilinear") for c in cut])


class SeenThing:
    """One part of a batch of images.

    Attributes:
        embeddings: (crops, batch, 64), of the identity judge.
        kinds: (batch, classes), whether the class is the likeliest one in a crop.
        colours: (batch,), index of the colour in the crop whose class is surest.
        patterns: (batch,), the same.
    """

    @torch.no_grad()
    def __init__(self, judges: Judges, images: Tensor, part: int, parts: int) -> None:
        crops = crops_of(images, part, parts)
        flat = crops.flatten(0, 1)
        self.embeddings = judges.identity(flat).unflatten(0, crops.shape[:2])
        trunk = judges.attributes.thing(flat)
        logits = {
            name: head(trunk).unflatten(0, crops.shape[:2])
            for name, head in judges.attributes.thing_heads.items()
        }
        shares = logits["kind"].softmax(-1)
        self.kinds = F.one_hot(shares.argmax(-1), len(CLASSES)).any(0)
        best = shares.amax(-1).argmax(0)
        row = torch.arange(images.shape[0])
        self.colours = logits["colour"].argmax(-1)[best, row]
        self.patterns = logits["pattern"].argmax(-1)[best, row]

    def shows(self, prototype: Tensor, threshold: float) -> Tensor:
        """Whether a crop is recognised as the concept of a prototype (64,): (batch,)."""
        return (1 - self.embeddings @ prototype).amin(0) <= threshold


@torch.no_grad()
def places_of(judges: Judges, images: Tensor) -> list[str]:
    """The place of each image; of a wide one that of its two ends together."""
    ends = (images[..., :64], images[..., -64:])
    logits = sum(
        judges.attributes.scene_heads["place"](judges.attributes.scene(end)) for end in ends
    )
    return [BACKGROUNDS[k] for k in logits.argmax(-1).tolist()]  # type: ignore[union-attr]


class Scorer:
    """Scores images of scenes."""

    def __init__(self, judges: Judges) -> None:
        self.judges = judges
        self._prototypes: dict[str, Tensor] = {}

    def prototype(self, name: str) -> Tensor:
        if name not in self._prototypes:
            self._prototypes[name] = self.judges.prototype(judge_inputs(story(name).images()))
        return self._prototypes[name]

    def hits(self, scene: Scene, views: Sequence[Tensor]) -> list[Hit]:
        """Score each image of a scene.

        Args:
            scene: The scene.
            views: For each thing the images (batch, 3, *size) in [-1, 1] that show it, usually the
                same.

        Returns:
            For each image: "part 0", "part 1", ...: whether the concept is recognised in its part;
            "all" of them; "swapped": one in another's part and not in its own; "missing": in no
            order has each part one of the things, recognised by its identity or its class; "place".
            For scenes with a plain class: "part 0" or "part 1" of the named concept only, and what
            :meth:`leaks` returns.
        """
        parts = len(scene.names)
        seen = [SeenThing(self.judges, view, i, parts) for i, view in enumerate(views)]
        limit = self.judges.threshold
        known = [
            [thing.shows(self.prototype(name), limit) for thing in seen] for name in scene.names
        ]
        classes = [CLASSES.index(class_of(name)) for name in scene.names]
        shown = [places_of(self.judges, view) for view in views]
        wanted = [parse_prompt(prompt).background for prompt in scene.prompts]
        triggers = [story(name).trigger for name in scene.names]
        named = [i for i in range(parts) if scene.things[i] == triggers[i]]
        leaks = self.leaks(scene, seen) if len(named) == 1 else {}
        results = []
        for k in range(len(scene.prompts)):
            own = {i: bool(known[i][i][k]) for i in named}
            others = {i: any(bool(known[i][j][k]) for j in range(parts) if j != i) for i in named}
            hit: Hit = {f"part {i}": float(right) for i, right in own.items()}
            hit["all"] = float(all(own.values()))
            hit["swapped"] = float(any(others[i] and not own[i] for i in named))
            hit["missing"] = float(
                not any(
                    all(
                        bool(seen[j].kinds[k, classes[i]] | known[i][j][k])
                        for i, j in enumerate(order)
                    )
                    for order in permutations(range(parts))
                )
            )
            hit["place"] = float(all(places[k] == wanted[k] for places in shown))
            hit |= {name: float(values[k]) for name, values in leaks.items()}
            results.append(hit)
        return results

    def leaks(self, scene: Scene, seen: Sequence[SeenThing]) -> dict[str, list[bool]]:
        """What the plain thing has of the concepts, for each image.

        Returns:
            "recognised" as one of the attached concepts; "coloured": in the colour and the pattern
            of the concept that the prompt names; "leak": one of both.
        """
        triggers = [story(name).trigger for name in scene.names]
        named = next(i for i, thing in enumerate(scene.things) if thing == triggers[i])
        plain = seen[1 - named]
        limit = self.judges.threshold
        recognised = torch.stack(
            [plain.shows(self.prototype(name), limit) for name in scene.names]
        ).any(0)
        identity = story(scene.names[named]).identity
        colour = COLOUR_LABELS.index(identity.colour or "other")
        pattern = PATTERNS.index(identity.pattern)
        coloured = (plain.colours == colour) & (plain.patterns == pattern)
        return {
            "recognised": recognised.tolist(),
            "coloured": coloured.tolist(),
            "leak": (recognised | coloured).tolist(),
        }


def mean_of(hits: Sequence[Hit], column: str) -> float | None:
    """The share of images with a hit; None where the column is not scored."""
    values = [hit[column] for hit in hits if column in hit]
    return sum(values) / len(values) if values else None


def standard_error(share: float, count: int) -> float:
    return float((share * (1 - share) / count) ** 0.5)


def rates(hits: Sequence[Hit]) -> dict[str, Any]:
    """The shares of a group's images, in the order of columns."""
    columns = ("all", "part 0", "part 1", "part 2", "swapped", "missing", "place")
    row: dict[str, Any] = {}
    for column in (*columns, "leak", "recognised", "coloured"):
        share = mean_of(hits, column)
        if share is not None:
            row[column] = share
        if share is not None and column in ("all", "leak"):
            row[f"{column}_error"] = standard_error(share, len(hits))
    return row
