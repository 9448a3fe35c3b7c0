"""Pictures of icon sets in Iconify's JSON format, as SVG."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def icon_svg(icons: Mapping[str, Any], name: str) -> str | None:
    """The square SVG of an icon; None if the set has none of this name, or only a turned one.

    Args:
        icons: Of `icons.json`: bodies of icons, aliases, and default width and height.
        name: Of the icon, or an alias.
    """
    for _ in range(8):  # aliases of aliases
        alias = icons.get("aliases", {}).get(name)
        if alias is None:
            break
        if alias.keys() & {"hFlip", "vFlip", "rotate"}:
            return None
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    left, top = left - (side - width) / 2, top - (side - height) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}" width="{side}" height="{side}">'
        f"{icon['body']}</svg>"
    )


def emoji_svg(icons: Mapping[str, Any], names: Mapping[str, str], code: str) -> str | None:
    """The SVG of an emoji; None if the set has none.

    Args:
        icons: Of `icons.json`.
        names: Of `chars.json`: code points, lower-case -> name of the icon.
        code: Code points in hexadecimal, joined by hyphens, with or without U+FE0F.
    """
    for key in (code, f"{code}-fe0f", code.replace("-fe0f", "")):
        if key in names:
            return icon_svg(icons, names[key])
    return None
