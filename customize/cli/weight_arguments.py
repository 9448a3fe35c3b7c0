"""``--weights``: a number for each concept, or weights by concept, component and block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from customize.cli.command_support import parse_weight_list
from customize.errors import ConfigError

#: A weight for each concept in order, or a dict as :func:`customize.load_custom` takes it.
Given = list[float] | dict[str, Any]


def parse_weights(text: str | None, count: int) -> Given:
    """``"1,0.8"``, or ``"rex=0.8,rex.text_encoder=0.5,rex.unet.up.block_1=0.4/0.8/1"``.

    Args:
        text: of the flag; None: 1 for each concept.
        count: the number of concepts.

    Raises:
        ConfigError: it is neither, or a name is given twice.
    """
    if text is None or "=" not in text:
        return parse_weight_list(text, count) or [1.0] * count
    found: dict[str, Any] = {}
    for part in text.split(","):
        path, _, value = part.partition("=")
        keys = [key.strip() for key in path.split(".")]
        try:
            numbers = [float(number) for number in value.split("/")]
        except ValueError:
            numbers = []
        if not numbers or not all(keys):
            raise ConfigError(
                f"{part.strip()!r} is not a weight",
                where="--weights",
                fix="write such as --weights rex=0.8,rex.text_encoder=0.5,rex.unet.down=0.8",
            )
        inner = found
        for key in keys:
            inner = inner.setdefault(key, {})
        if "" in inner:
            raise ConfigError(
                f"two weights are given for {path.strip()}",
                where="--weights",
                fix="give one for each",
            )
        inner[""] = numbers if len(numbers) > 1 else numbers[0]
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Mapping[str, Any]) -> Any:
    """A number where nothing more is said of parts."""
    if set(value) == {""}:
        return value[""]
    return {key: inner if key == "" else _plain(inner) for key, inner in value.items()}
