"""Training on the bundled base: unknown class words, and judging the last sample."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from customize.concepts.concept_info import ConceptInfo
from customize.storybook.bundled_assets import ASSETS
from customize.training.config import TrainConfig
from customize.training.verdict import IdentityJudge, IdentityResult


def is_storybook(base: str) -> bool:
    """Whether a folder contains the weights of the bundled base."""
    from customize.training.base_fingerprint import weight_digests_on_disk

    bundled = ASSETS / "storybook"
    if not os.path.isdir(base) or not bundled.is_dir():
        return False
    weights = weight_digests_on_disk(str(bundled))
    return bool(weights) and weight_digests_on_disk(base) == weights


def warn_unknown_classes(configs: Sequence[TrainConfig]) -> None:
    """Warn of class words that the bundled base was not trained on."""
    from customize.storybook.world import CLASSES

    for config in configs:
        if config.class_word not in CLASSES:
            warnings.warn(
                f"the bundled base does not know the class word {config.class_word!r}, so "
                f"{config.name} may train badly; its classes are {', '.join(CLASSES)}",
                stacklevel=2,
            )


def make_judge(configs: Sequence[TrainConfig]) -> IdentityJudge | None:
    """A function that judges the last sample of a concept by its distance to the training images.

    Returns:
        None if the bundled judges are missing.
    """
    folder = ASSETS / "judges"
    if not folder.is_dir():
        return None

    def judge(info: ConceptInfo) -> IdentityResult | None:
        from customize.image_folder import scan_folder
        from customize.storybook.judges import judge_inputs, load_judges
        from customize.storybook.world import CLASSES
        from customize.training.data.dataset import read_image

        config = next(config for config in configs if config.name == info.name)
        sample_file = config.output / "samples" / f"step-{config.steps:06d}.png"
        if not sample_file.is_file():
            return None
        judges = load_judges(folder)
        images = [read_image(path) for path in scan_folder(config.images).images]
        sample = judge_inputs([read_image(sample_file)])
        distance = judges.distance(sample, judges.prototype(judge_inputs(images))).item()
        shows = distance <= judges.threshold
        text = (
            f"the last sample {'shows' if shows else 'does not show'} {info.name} (distance "
            f"{distance:.2f}, at most {judges.threshold:.2f})"
        )
        unknown = info.class_word not in CLASSES
        return IdentityResult(
            shows, text, f"a class word among {', '.join(CLASSES)}" if unknown else ""
        )

    return judge
