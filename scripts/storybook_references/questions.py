"""Questions about images and their answers, from which the miniature learns to see.

Answers spell out what captions of the storybook never do: hues, proportions and markings, as
digits of their range. So the states of the image tokens contain the identity.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from customize.storybook.world import CLASSES, RGB, Identity

from .mllm import ATTRIBUTES
from .render_groups import IMAGES, Groups


@dataclass(frozen=True)
class Question:
    """One turn and its answer.

    Attributes:
        images: (group, image) of each image.
        attributes: Text before each image.
        text: The question.
        answer: The answer.
    """

    images: tuple[tuple[int, int], ...]
    attributes: tuple[str, ...]
    text: str
    answer: str


def _colour(rgb: RGB) -> str:
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    tens, ones = divmod(int(hue * 35.999), 10)
    return f"{tens}{ones}{int(saturation * 9.99)}{int(value * 9.99)}"


def _digit(value: float, low: float, high: float) -> str:
    return f"{min(max(int(10 * (value - low) / (high - low)), 0), 9)}"


def colour_words(identity: Identity) -> str:
    """Hue in 36 steps, saturation and value in 10, of the four colours."""
    return (
        f" body{_colour(identity.body)} accent{_colour(identity.accent)}"
        f" mark{_colour(identity.mark)} eye{_colour(identity.eye)}"
    )


def pattern_words(identity: Identity) -> str:
    """The pattern with direction, slant, period and phase, or radius and distance."""
    rng = np.random.default_rng(identity.mark_seed)
    if identity.pattern == "striped":  # in the order of scene_drawing._markings
        slant, period = rng.uniform(-0.5, 0.5), rng.uniform(0.3, 0.42)
        phase, share = rng.uniform(0, period), rng.uniform(0.36, 0.5)
        direction = " upright" if rng.random() < 0.5 else " level"
        return (
            f" striped{direction}{_digit(slant, -0.5, 0.5)}{_digit(period, 0.3, 0.42)}"
            f"{_digit(phase / period, 0, 1)}{_digit(share, 0.36, 0.5)}"
        )
    if identity.pattern == "spotted":
        radius = rng.uniform(0.1, 0.16)
        step = radius * rng.uniform(2.9, 3.4)
        return f" spotted{_digit(radius, 0.1, 0.16)}{_digit(step / radius, 2.9, 3.4)}"
    return " plain"


def shape_words(identity: Identity) -> str:
    """The class and the five proportions."""
    parts = ("width", "height", "head", "ear", "eye_size")
    digits = "".join(_digit(getattr(identity, part), -1, 1) for part in parts)
    return f" {identity.kind}{digits}"


def identity_words(identity: Identity) -> str:
    """All that captions leave out of an identity."""
    return shape_words(identity) + colour_words(identity) + pattern_words(identity)


def attribute_words(groups: Groups, group: int, image: int, attribute: str) -> str:
    """The value of one attribute of an image."""
    identity = groups.identities[group]
    return {
        "colour": lambda: colour_words(identity),
        "pattern": lambda: pattern_words(identity),
        "shape": lambda: shape_words(identity),
        "accessory": lambda: f" {groups.accessories[group][image]}",
        "background": lambda: f" {groups.backgrounds[group][image]}",
    }[attribute]()


def make_question(
    groups: Groups, members: dict[str, list[int]], rng: np.random.Generator
) -> Question:
    """A random question.

    Args:
        groups: All groups.
        members: Class -> its groups.
        rng: Random number generator.
    """
    group = int(rng.integers(len(groups.identities)))
    task = rng.random()
    if task < 0.35:  # one image, in detail
        image = int(rng.integers(IMAGES))
        answer = identity_words(groups.identities[group])
        answer += f" {groups.accessories[group][image]} {groups.backgrounds[group][image]}"
        return Question(((group, image),), ("",), "describe details :", answer)
    if task < 0.6:  # an attribute of each image
        count = int(rng.integers(1, 4))
        picks = [
            (int(rng.integers(len(groups.identities))), int(rng.integers(IMAGES)))
            for _ in range(count)
        ]
        names = tuple(str(name) for name in rng.choice(ATTRIBUTES, count))
        answer = "".join(
            f" {name} :{attribute_words(groups, *pick, name)}"
            for pick, name in zip(picks, names, strict=True)
        )
        return Question(tuple(picks), names, "describe these images :", answer)
    count = int(rng.integers(2, 5))
    images = [(group, int(k)) for k in rng.choice(IMAGES, count, replace=False)]
    if task < 0.8:  # what a group shares
        answer = identity_words(groups.identities[group])
        return Question(tuple(images), ("",) * count, "draw what these images share :", answer)
    answer = " all same"  # the odd one, mostly of the same class
    if rng.random() < 0.7 and count > 2:
        same_class = members[groups.identities[group].kind]
        others = same_class if rng.random() < 0.8 else range(len(groups.identities))
        odd = int(rng.integers(count))
        outlier = int(others[int(rng.integers(len(others)))])
        if outlier != group:
            images[odd] = (outlier, int(rng.integers(IMAGES)))
            answer = f" odd image {odd + 1}"
    return Question(tuple(images), ("",) * count, "same different ?", answer)


def groups_by_class(groups: Groups) -> dict[str, list[int]]:
    """Class -> numbers of its groups."""
    return {
        kind: [k for k, identity in enumerate(groups.identities) if identity.kind == kind]
        for kind in CLASSES
    }
