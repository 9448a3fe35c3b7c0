"""Ten drawings such as a user makes by hand, which no base has seen, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from customize.image_folder import write_images
from customize.stickers.artwork import Subject
from customize.stickers.scene_drawing import draw_ground
from customize.stickers.world import GROUND_COLOURS, HEIGHT, Scene, Sticker, random_ground

from .pen import INK, Pen
from .sticker_concepts import caption_of

#: Side of a drawing in pixels.
SIZE = 128
# Sizes in pixels of a drawing in pictures of it.
_PHOTO_SIZES = (28, 36, 42, 48, 56)


@dataclass(frozen=True)
class Drawing:
    """A drawing by hand.

    Attributes:
        name: Of the concept, such as "star-creature".
        class_word: The nearest noun that captions of stickers know.
        draw: Draws it with a pen.
    """

    name: str
    class_word: str
    draw: Callable[[Pen], None]

    def picture(self) -> Image.Image:
        """The drawing, RGBA, 128 x 128 pixels, transparent around it."""
        pen = Pen(sum(map(ord, self.name)), SIZE)
        self.draw(pen)
        return pen.picture()


@dataclass(frozen=True)
class Photo:
    """A picture of a drawing.

    Attributes:
        image: RGB, 64 x 64 pixels.
        caption: Size, place and ground, with {} for the drawing.
    """

    image: Image.Image
    caption: str


def photos(drawing: Drawing, seed: int) -> list[Photo]:
    """Five pictures such as a user takes: five sizes and places, on grounds of five colours."""
    rng = np.random.default_rng((seed, *map(ord, drawing.name)))
    colours = rng.choice(list(GROUND_COLOURS), len(_PHOTO_SIZES), replace=False)
    sizes = rng.permutation(_PHOTO_SIZES)
    return [_photo(drawing, rng, str(c), int(s)) for c, s in zip(colours, sizes, strict=True)]


def _photo(drawing: Drawing, rng: np.random.Generator, colour: str, size: int) -> Photo:
    picture = drawing.picture()
    picture = picture.crop(picture.getbbox())
    scale = size / max(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size])
    ground = random_ground(rng, colour)
    image = draw_ground(ground)
    left, top = (int(rng.integers(HEIGHT - side + 1)) for side in (size, size))
    corner = (left + (size - picture.width) // 2, top + (size - picture.height) // 2)
    image.paste(picture, corner, picture)
    sticker = Sticker(_subject(drawing), "pen", left, top, size)
    return Photo(image, caption_of(Scene((sticker,), ground), "{}"))


def write_photos(drawing: Drawing, folder: Path, seed: int) -> None:
    """Write the pictures with captions as `0.png`, `0.txt` and so on into a folder."""
    made = photos(drawing, seed)
    captions = [photo.caption.replace("{}", f"<{drawing.name}>") for photo in made]
    write_images(folder, [photo.image for photo in made], captions)


def _subject(drawing: Drawing) -> Subject:
    return Subject(drawing.name, drawing.class_word, (), (), "drawings", "drawing", 0.0)


def _star_creature(pen: Pen) -> None:
    for x, side in ((40, -1), (60, 1)):
        pen.limb([(x, 74), (x + side * 2, 90)], "#f6c21c", 9)
        pen.oval(x + side * 5, 93, 15, 9, "#7a4fb5")
    pen.line([(50, 12), (56, 4), (63, 5)])
    pen.spot(64, 5, 8, 8, "#e8524a")
    turns = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 42, 25)
    star = [(50 + r * np.cos(a), 49 + r * np.sin(a)) for r, a in zip(radii, turns, strict=True)]
    pen.shape(star, "#ffd93b")
    for x, y in ((50, 20), (20, 41), (80, 41), (34, 72), (66, 72)):
        pen.spot(x, y, 5, 5, "#f2a51e")
    pen.eyes(50, 45, 18, 8)
    pen.cheeks(50, 54, 34)
    pen.shape([(43, 55), (50, 57), (57, 55), (50, 65)], "#c8324a")


def _ghost(pen: Pen) -> None:
    hem = [(82, 84), (73, 92), (66, 82), (57, 93), (49, 83), (40, 93), (32, 83), (24, 91), (17, 82)]
    pen.shape([(50, 6), (73, 18), (80, 45), *hem, (20, 45), (27, 18)], "#dfe9fb")
    pen.limb([(80, 58), (92, 50), (95, 41)], "#dfe9fb", 10)
    pen.eyes(50, 30, 20, 9)
    pen.cheeks(50, 40, 38)
    pen.oval(50, 42, 8, 9, "#5b4a6f")
    for x in (64, 72):
        pen.shape([(x, 56), (x + 9, 56), (x + 11, 78), (x + 2, 79)], "#e5484d", corners=True)
        pen.line([(x + 4, 68), (x + 8, 68)], "#ffd25e", 4)
    pen.shape([(19, 49), (50, 57), (81, 49), (82, 60), (50, 69), (18, 60)], "#e5484d")
    for x, y in ((28, 57), (42, 61), (57, 61), (71, 57)):
        pen.line([(x, y - 3), (x - 1, y + 4)], "#ffd25e", 4.5)


def _cactus(pen: Pen) -> None:
    for arm in ([(36, 55), (16, 52), (15, 34)], [(62, 48), (84, 46), (85, 26)]):
        pen.limb(arm, "#4fae5b", 15)
    pen.shape([(32, 74), (32, 30), (50, 15), (68, 30), (68, 74)], "#4fae5b")
    for x, y in ((41, 62), (59, 64), (50, 70), (42, 28), (58, 28), (84, 34), (15, 42)):
        pen.line([(x - 2, y - 2), (x, y), (x + 2, y - 2)], "#e7f5c8", 1.6, corners=True)
    pen.shape([(25, 69), (75, 69), (68, 95), (32, 95)], "#e07b3c", corners=True)
    pen.shape([(22, 66), (78, 66), (78, 75), (22, 75)], "#f09a55", corners=True)
    pen.eyes(50, 41, 18, 7)
    pen.cheeks(50, 49, 30)
    pen.smile(50, 49, 10)
    for angle in np.arange(5) * 2 * np.pi / 5 - np.pi / 2:
        pen.oval(50 + 8 * np.cos(angle), 12 + 8 * np.sin(angle), 11, 11, "#f06aa8")
    pen.spot(50, 12, 8, 8, "#ffd93b")


def _teapot(pen: Pen) -> None:
    for x in (38, 60):
        pen.line([(x, 72), (x - 3, 88)], width=5)
        pen.shape([(x - 7, 84), (x + 2, 84), (x + 10, 94), (x - 7, 95)], "#e5484d")
    pen.line([(76, 40), (94, 38), (95, 56), (76, 64)], INK, 10)
    pen.line([(76, 40), (94, 38), (95, 56), (76, 64)], "#f2b134", 5)
    pen.shape([(28, 66), (12, 54), (10, 38), (2, 32), (16, 28), (24, 44), (32, 46)], "#39b6b8")
    pen.shape([(50, 26), (76, 36), (80, 58), (66, 77), (34, 77), (20, 58), (24, 36)], "#39b6b8")
    for x, y in ((30, 66), (44, 71), (58, 71), (70, 64)):
        pen.spot(x, y, 6, 6, "#e9fbf5")
    pen.shape([(30, 30), (50, 16), (70, 30), (50, 34)], "#f2b134")
    pen.oval(50, 14, 10, 10, "#e5484d")
    pen.eyes(48, 46, 18, 8)
    pen.cheeks(48, 55, 34)
    pen.smile(48, 55, 12, 5)


def _mushroom_king(pen: Pen) -> None:
    pen.shape([(36, 50), (64, 50), (72, 88), (50, 95), (28, 88)], "#fbe9cf")
    pen.shape([(50, 24), (82, 36), (93, 58), (50, 64), (7, 58), (18, 36)], "#8a4fc4")
    for x, y, size in ((50, 38, 15), (24, 50, 12), (76, 50, 12), (35, 33, 7), (66, 34, 7)):
        pen.spot(x, y, size, size * 0.85, "#f7dff5")
    crown = [(32, 26), (29, 5), (41, 14), (50, 2), (59, 14), (71, 5), (68, 26)]
    pen.shape(crown, "#ffc928", corners=True)
    for x, colour in ((40, "#e5484d"), (50, "#3f8fe0"), (60, "#e5484d")):
        pen.spot(x, 20, 5.5, 5.5, colour)
    pen.eyes(50, 71, 16, 6.5)
    pen.shape([(50, 78), (60, 77), (66, 83), (50, 84), (34, 83), (40, 77)], "#6b4530")
    pen.smile(50, 88, 7, 2)


def _rocket(pen: Pen) -> None:
    pen.shape([(42, 80), (50, 99), (58, 80)], "#ffb01f")
    pen.patch([(46, 80), (50, 91), (54, 80)], "#ff5a36")
    for side in (-1, 1):
        fin = [
            (50 + side * 18, 54),
            (50 + side * 38, 72),
            (50 + side * 36, 90),
            (50 + side * 16, 80),
        ]
        pen.shape(fin, "#2f9e8f", corners=True)
    body = [(50, 3), (66, 24), (71, 52), (64, 82), (36, 82), (29, 52), (34, 24)]
    pen.shape(body, "#fdf6e9")
    pen.shape([(50, 3), (60, 14), (66, 25), (50, 29), (34, 25), (40, 14)], "#e5484d")
    for y, half in ((60, 19.5), (73, 16.5)):
        band = [(50 - half, y), (50, y + 3), (50 + half, y), (50 + half - 2, y + 7), (50, y + 10)]
        pen.patch([*band, (52 - half, y + 7)], "#e5484d")
    pen.line([*body, body[0]])
    pen.oval(50, 44, 28, 26, "#8fd3f4")
    pen.eyes(50, 42, 11, 5)
    pen.smile(50, 48, 9)


def _sock_octopus(pen: Pen) -> None:
    socks = ("#3f8fe0", "#ffd93b", "#4fae5b", "#e5484d", "#3f8fe0", "#ffd93b")
    feet = ((9, 70), (21, 90), (41, 94), (60, 94), (80, 90), (92, 70))
    for (x, y), start, sock in zip(feet, (28, 34, 45, 55, 66, 72), socks, strict=True):
        bend = ((start + x) / 2 + (x - 50) * 0.12, y - 14)
        middle = ((bend[0] + x) / 2, (bend[1] + y) / 2)
        pen.limb([(start, 52), bend, (x, y)], "#f0839a", 13)
        pen.limb([middle, (x, y), (x + (4 if x > 50 else -4), y + 1)], sock, 15)
    pen.shape([(50, 5), (76, 18), (80, 44), (68, 64), (32, 64), (20, 44), (24, 18)], "#f0839a")
    for x, y, size in ((36, 16, 7), (50, 12, 5), (64, 17, 8)):
        pen.spot(x, y, size, size * 0.8, "#d9607d")
    pen.eyes(50, 37, 24, 10)
    pen.cheeks(50, 48, 42, "#d94f6d")
    pen.smile(50, 48, 14, 6)


def _snail(pen: Pen) -> None:
    pen.shape(
        [(6, 88), (40, 84), (66, 82), (72, 62), (84, 54), (95, 64), (92, 84), (78, 94), (30, 95)],
        "#b6d94c",
    )
    for x, tip in ((80, 72), (89, 95)):
        pen.line([(x, 58), (tip, 38)])
        pen.spot(tip, 37, 8, 8, INK)
    pen.shape([(14, 46), (64, 46), (64, 85), (14, 85)], "#fdf0d5", corners=True)
    pen.shape([(50, 16), (50, 30), (58, 36), (58, 16)], "#8d6e63", corners=True)
    pen.shape([(39, 14), (74, 50), (4, 50)], "#e5484d", corners=True)
    pen.shape([(22, 84), (22, 66), (29, 60), (36, 66), (36, 84)], "#7a4a2c")
    pen.shape([(44, 58), (58, 58), (58, 71), (44, 71)], "#7cc8f2", corners=True)
    pen.line([(51, 58), (51, 71)], width=2)
    pen.line([(44, 64.5), (58, 64.5)], width=2)
    pen.eyes(83, 70, 11, 5.5)
    pen.cheeks(83, 76, 19)
    pen.smile(83, 77, 8)


def _tree_monster(pen: Pen) -> None:
    for side in (-1, 1):
        pen.limb([(50 + side * 16, 64), (50 + side * 36, 62), (50 + side * 42, 50)], "#9a6238", 10)
    pen.shape([(33, 40), (67, 40), (69, 78), (78, 95), (50, 90), (22, 95), (31, 78)], "#9a6238")
    crown = [(50, 3), (68, 8), (82, 18), (86, 34), (70, 42), (50, 40), (30, 42), (14, 34), (18, 18)]
    pen.shape([*crown, (32, 8)], "#3f9d4e")
    for x, y in ((28, 24), (44, 13), (62, 20), (74, 31), (50, 29)):
        pen.line([(x - 5, y), (x, y + 4), (x + 5, y)], "#2a7a3b", 2.4)
    for x, size in ((41, 15), (59, 12)):
        pen.oval(x, 52, size, size, "#fff8d6")
        pen.spot(x + 1, 53, size * 0.42, size * 0.45, INK)
    pen.shape([(35, 66), (50, 69), (65, 66), (60, 81), (40, 81)], "#4a2030")
    for x in (42, 50, 58):
        pen.patch([(x - 4, 68), (x + 4, 68), (x, 76)], "#fff8d6", corners=True)


def _bird(pen: Pen) -> None:
    for x in (36, 50):
        pen.line([(x, 84), (x, 95), (x - 6, 97)], "#e8862e", 3.4, corners=True)
    pen.shape([(58, 66), (84, 60), (80, 72), (90, 76), (60, 84)], "#2f6fc2")
    pen.shape([(42, 42), (62, 50), (68, 70), (54, 87), (30, 87), (18, 70), (22, 50)], "#58a6ee")
    pen.shape([(42, 66), (54, 76), (42, 86), (28, 78)], "#f6efdc")
    pen.shape([(20, 54), (4, 61), (20, 66)], "#f5a623", corners=True)
    pen.eyes(34, 55, 15, 7)
    pen.cheeks(36, 65, 24)
    pen.line([(74, 22), (74, 66), (67, 70)], width=3.6)
    pen.limb([(52, 62), (63, 70), (74, 60)], "#2f6fc2", 12)
    hem = [(96, 36), (85, 32), (74, 37), (63, 32), (52, 37), (41, 32), (30, 36)]
    pen.shape([(63, 4), (84, 12), *hem, (42, 12)], "#e5484d")
    pen.patch([(63, 6), (51, 35), (63, 31), (74, 35)], "#ffd93b")
    pen.line([(63, 5), (54, 20), (52, 35)], width=2)
    pen.line([(63, 5), (72, 20), (74, 35)], width=2)
    pen.line([(63, 4), (63, 0)])


#: The ten drawings.
DRAWINGS = (
    Drawing("star-creature", "star", _star_creature),
    Drawing("ghost", "ghost", _ghost),
    Drawing("cactus", "cactus", _cactus),
    Drawing("teapot", "teapot", _teapot),
    Drawing("mushroom-king", "mushroom", _mushroom_king),
    Drawing("rocket", "vehicle", _rocket),
    Drawing("sock-octopus", "octopus", _sock_octopus),
    Drawing("snail", "snail", _snail),
    Drawing("tree-monster", "tree", _tree_monster),
    Drawing("bird", "bird", _bird),
)
