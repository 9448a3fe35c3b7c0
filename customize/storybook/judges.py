"""The storybook's judges: nets that recognise the attributes and the identity in an image.

Two strided convolution nets, trained on drawn scenes degraded like generated images (blur, noise,
colour shift, autoencoder round trips). No model is trained against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from customize.core.precision import full_precision
from customize.image_tensors import images_to_tensor
from customize.judge_nets import conv_trunk, judge_errors, read_judges
from customize.storybook.world import ACCESSORIES, BACKGROUNDS, CLASSES, COLOURS, PATTERNS

COLOUR_LABELS = (*COLOURS, "other")
# The heads of the attribute judge -> their labels; slot 0 is the left or only thing.
# The head of the background has the name "place" in the files of the judges.
HEADS: dict[str, tuple[str, ...]] = {"count": ("one", "two"), "place": BACKGROUNDS}
for _slot in ("0", "1"):
    HEADS |= {f"kind{_slot}": CLASSES, f"colour{_slot}": COLOUR_LABELS}
    HEADS |= {f"pattern{_slot}": PATTERNS, f"accessory{_slot}": ACCESSORIES}

THING_HEADS = ("kind", "colour", "pattern", "accessory")

# Position of a thing -> its square box (left, top, side), which is resized to 64 x 64.
CROPS = {"single": (6, 10, 52), "left": (0, 22, 36), "right": (28, 22, 36)}


class AttributeJudge(nn.Module):
    """Classifies images (batch, 3, 64, 64) in [-1, 1] into the labels of :data:`HEADS`.

    The heads "count" and "place" see the whole image; the others see a crop of the left or only
    thing (slot 0) and of the right one (slot 1, undefined in an image of one thing).
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Sequential(conv_trunk((16, 24, 32, 48)), nn.Flatten(), nn.ReLU())
        self.thing = nn.Sequential(
            conv_trunk((24, 40, 64, 96)), nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU()
        )
        self.scene_heads = nn.ModuleDict(
            {name: nn.Linear(48 * 16, len(HEADS[name])) for name in ("count", "place")}
        )
        self.thing_heads = nn.ModuleDict(
            {name: nn.Linear(128, len(HEADS[f"{name}0"])) for name in THING_HEADS}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return head -> logits (batch, labels)."""
        scene = self.scene(images)
        logits = {name: head(scene) for name, head in self.scene_heads.items()}
        two = (logits["count"].argmax(1) == 1)[:, None, None, None]
        first = torch.where(two, crop_thing(images, "left"), crop_thing(images, "single"))
        things = self.thing(torch.cat([first, crop_thing(images, "right")]))
        for name, head in self.thing_heads.items():
            logits[f"{name}0"], logits[f"{name}1"] = head(things).chunk(2)
        return logits


class IdentityJudge(nn.Module):
    """Embeds crops (batch, 3, 64, 64) in [-1, 1] as unit vectors (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = conv_trunk((24, 48, 72, 96))
        self.project = nn.Linear(96 * 16, 64)

    def forward(self, crops: Tensor) -> Tensor:
        """Return unit vectors (batch, 64)."""
        return F.normalize(self.project(self.trunk(crops).flatten(1)), dim=1)


def crop_thing(images: Tensor, position: str) -> Tensor:
    """Crop the thing at "single", "left" or "right" from images (batch, 3, 64, 64).

    Returns:
        (batch, 3, 64, 64), resized bilinearly.
    """
    left, top, side = CROPS[position]
    cut = images[:, :, top : top + side, left : left + side]
    return F.interpolate(cut, size=(64, 64), mode="bilinear", align_corners=False)


def judge_inputs(images: Sequence[Image.Image]) -> Tensor:
    """Resize n images to the judges' inputs, (n, 3, 64, 64), float32 in [-1, 1]."""
    small = [image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for image in images]
    return images_to_tensor(small)


@dataclass(frozen=True)
class Judges:
    """Both judges in evaluation mode.

    Attributes:
        attributes: Classifier of attributes.
        identity: Embedding of identities.
        threshold: Cosine distance to a concept's prototype, at equal error rates, up to which an
            image counts as showing the concept.
    """

    attributes: AttributeJudge
    identity: IdentityJudge
    threshold: float

    @full_precision(tf32=True)
    @torch.no_grad()
    def predict_attributes(self, images: Tensor) -> list[dict[str, str]]:
        """Predict the label of each head of :data:`HEADS` for images (n, 3, 64, 64) in [-1, 1]."""
        logits = self.attributes(images)
        best = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
        return [{name: HEADS[name][best[name][k]] for name in HEADS} for k in range(len(images))]

    @full_precision(tf32=True)
    @torch.no_grad()
    def prototype(self, references: Tensor) -> Tensor:
        """The normalised mean embedding (64,) of reference images (n, 3, 64, 64) of one thing."""
        return F.normalize(self.identity(crop_thing(references, "single")).mean(0), dim=0)

    @full_precision(tf32=True)
    @torch.no_grad()
    def distance(self, images: Tensor, prototype: Tensor, position: str = "single") -> Tensor:
        """Cosine distance of the thing at a position to a prototype, in [0, 2].

        Args:
            images: (n, 3, 64, 64) in [-1, 1].
            prototype: (64,) from :meth:`prototype`.
            position: "single", "left" or "right".

        Returns:
            (n,).
        """
        return 1 - self.identity(crop_thing(images, position)) @ prototype


def load_judges(folder: str | Path) -> Judges:
    """Load the judges that ``scripts/train_storybook.py`` writes.

    Raises:
        ConceptError: A file is missing, damaged or from another architecture.
    """
    folder = Path(folder)
    fix = "restore assets/judges, or train it with scripts/train_storybook.py"
    attributes, identity = AttributeJudge(), IdentityJudge()
    with judge_errors("the storybook's judges", folder, fix):
        nets = {"attributes": attributes, "identity": identity}
        threshold, _ = read_judges(folder, nets)
    return Judges(attributes, identity, threshold)
