"""The folder ``assets`` of the checkout: the bundled base, its judges and the demo's images."""

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
