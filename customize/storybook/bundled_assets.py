"""The folder ``assets`` of the checkout: the bundled base and what belongs to it."""

from __future__ import annotations

from pathlib import Path

from customize.errors import CustomizeError

#: Exists in a clone of the repository, not in an installed wheel.
ASSETS = Path(__file__).resolve().parents[2] / "assets"


def assets_folder() -> Path:
    """The folder ``assets``.

    Raises:
        CustomizeError: The folder does not contain the bundled base.
    """
    if not (ASSETS / "storybook" / "model_index.json").is_file():
        raise CustomizeError(
            "the bundled base model is missing",
            where=ASSETS / "storybook",
            fix="run from a clone of the repository, not from an installed wheel",
        )
    return ASSETS


def stickers_folder() -> Path:
    """The folder of the bundled base of stickers.

    Raises:
        CustomizeError: The checkout does not contain it.
    """
    folder = ASSETS / "stickers"
    if not (folder / "model_index.json").is_file():
        raise CustomizeError(
            "the bundled base of stickers is missing: there is no model_index.json",
            where=folder,
            fix="run from a clone of the repository that has it, or install the artwork with "
            "`make stickers`, train the base with scripts/train_storybook.py and copy it there",
        )
    return folder


def references_folder() -> Path | None:
    """The reference model of the bundled base; None if the checkout has none."""
    folder = ASSETS / "references"
    return folder if (folder / "references.json").is_file() else None


def rewriter_folder() -> Path | None:
    """The language model that rewrites prompts for the bundled base; None if there is none."""
    folder = ASSETS / "rewriter"
    return folder if (folder / "config.json").is_file() else None
