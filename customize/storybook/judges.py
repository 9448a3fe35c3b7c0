"""The storybook's judges: which attributes a picture shows, and whose dog it is.

Two strided convolution nets, trained on rendered scenes that were roughened the way generated
pictures are (blur, noise, colour shift, autoencoder round trips). Nothing is ever trained against
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from customize.core.precision import full_precision
from customize.errors import ConceptError
from customize.image_tensors import images_to_tensor
from customize.safe_read import MAX_TEXT_BYTES, read_json, read_safetensors
from customize.storybook.world import ACCESSORIES, CLASSES, COLOURS, PATTERNS, PLACES

COLOUR_LABELS = (*COLOURS, "other")
# The heads of the attribute judge and their labels; slot 0 is the left or only thing.
HEADS: dict[str, tuple[str, ...]] = {"count": ("one", "two"), "place": PLACES}
for _slot in ("0", "1"):
    HEADS |= {f"kind{_slot}": CLASSES, f"colour{_slot}": COLOUR_LABELS}
    HEADS |= {f"pattern{_slot}": PATTERNS, f"accessory{_slot}": ACCESSORIES}

THING_HEADS = ("kind", "colour", "pattern", "accessory")

# Square boxes (left, top, side) in which a thing stands, by where it is; all are scaled to 64 x 64.
CROPS = {"single": (6, 10, 52), "left": (0, 22, 36), "right": (28, 22, 36)}


def _trunk(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [
            nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        layers += [
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
    return nn.Sequential(*layers)


class AttributeJudge(nn.Module):
    """Pictures (batch, 3, 64, 64) in [-1, 1] to one row of logits a head (`HEADS`).

    How many things there are and where is read off the whole picture; what each is, off a crop of
    it, the left or only one (slot 0) and the right one (slot 1, meaningless in a picture of one).
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = nn.Sequential(_trunk((16, 24, 32, 48)), nn.Flatten(), nn.ReLU())
        self.thing = nn.Sequential(
            _trunk((24, 40, 64, 96)), nn.Flatten(), nn.Linear(96 * 16, 128), nn.ReLU()
        )
        self.scene_heads = nn.ModuleDict(
            {name: nn.Linear(48 * 16, len(HEADS[name])) for name in ("count", "place")}
        )
        self.thing_heads = nn.ModuleDict(
            {name: nn.Linear(128, len(HEADS[f"{name}0"])) for name in THING_HEADS}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        scene = self.scene(images)
        logits = {name: head(scene) for name, head in self.scene_heads.items()}
        two = (logits["count"].argmax(1) == 1)[:, None, None, None]
        first = torch.where(two, crop_thing(images, "left"), crop_thing(images, "single"))
        things = self.thing(torch.cat([first, crop_thing(images, "right")]))
        for name, head in self.thing_heads.items():
            logits[f"{name}0"], logits[f"{name}1"] = head(things).chunk(2)
        return logits


class IdentityJudge(nn.Module):
    """Crops (batch, 3, 64, 64) in [-1, 1] to unit vectors (batch, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _trunk((24, 48, 72, 96))
        self.project = nn.Linear(96 * 16, 64)

    def forward(self, crops: Tensor) -> Tensor:
        return F.normalize(self.project(self.trunk(crops).flatten(1)), dim=1)


def crop_thing(images: Tensor, where: str) -> Tensor:
    """Cut a thing out of pictures (batch, 3, 64, 64): `where` is "single", "left" or "right"."""
    left, top, side = CROPS[where]
    cut = images[:, :, top : top + side, left : left + side]
    return F.interpolate(cut, size=(64, 64), mode="bilinear", align_corners=False)


def judge_inputs(images: list[Image.Image]) -> Tensor:
    """Convert images to the judges' size: (batch, 3, 64, 64), float32 in [-1, 1]."""
    small = [image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) for image in images]
    return images_to_tensor(small)


@dataclass(frozen=True)
class Judges:
    """Both judges, ready to score.

    `threshold` is the equal-error cosine distance to a concept's references.
    """

    attributes: AttributeJudge
    identity: IdentityJudge
    threshold: float

    @full_precision(tf32=True)
    @torch.no_grad()
    def predict_attributes(self, images: Tensor) -> list[dict[str, str]]:
        """What is in each picture: a label a head."""
        logits = self.attributes(images)
        best = {name: rows.argmax(1).tolist() for name, rows in logits.items()}
        return [{name: HEADS[name][best[name][k]] for name in HEADS} for k in range(len(images))]

    @full_precision(tf32=True)
    @torch.no_grad()
    def prototype(self, references: Tensor) -> Tensor:
        """The unit mean vector (64,) of a concept's single-thing reference pictures."""
        return F.normalize(self.identity(crop_thing(references, "single")).mean(0), dim=0)

    @full_precision(tf32=True)
    @torch.no_grad()
    def distance(self, images: Tensor, signature: Tensor, where: str = "single") -> Tensor:
        """Cosine distance (batch,) of what stands at `where` to a concept's signature."""
        return 1 - self.identity(crop_thing(images, where)) @ signature


def load_judges(folder: str | Path) -> Judges:
    """Read the judges from a folder as `scripts/train_storybook.py` writes it.

    Raises:
        ConceptError: a file is missing, damaged or of other judges.
    """
    folder = Path(folder)
    try:
        threshold = float(read_json(folder / "judges.json", MAX_TEXT_BYTES)["threshold"])
        if not 0 < threshold < 2:
            raise ValueError(f"a cosine distance of {threshold} can't be the threshold")
        attributes, identity = AttributeJudge(), IdentityJudge()
        for judge, name in ((attributes, "attributes"), (identity, "identity")):
            tensors = load(read_safetensors(folder / f"{name}.safetensors"))
            judge.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConceptError(
            f"the storybook's judges can't be read: {error}",
            where=folder,
            fix="restore assets/judges, or make it with scripts/train_storybook.py",
        ) from error
    return Judges(attributes.eval(), identity.eval(), threshold)
