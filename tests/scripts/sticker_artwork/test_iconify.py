"""Icons of Iconify's format as SVG."""

from __future__ import annotations

import re

import pytest

from scripts.sticker_artwork.iconify import emoji_svg, icon_svg

ICONS = {
    "width": 36,
    "height": 36,
    "icons": {
        "tiger": {"body": "<circle r='3'/>"},
        "flag": {"body": "<rect/>", "width": 48, "top": -2},
    },
    "aliases": {
        "cat": {"parent": "tiger"},
        "kitten": {"parent": "cat"},
        "turned": {"parent": "tiger", "rotate": 1},
        "loop": {"parent": "loop"},
        "lost": {"parent": "nowhere"},
    },
}
NAMES = {"1f42f": "tiger", "2615-fe0f": "cat", "1f469-200d-1f680": "turned"}


def view_box(svg):
    return re.search(r'viewBox="([^"]+)" width="(\d+)" height="(\d+)"', svg).groups()


def test_an_icon_is_a_square_svg():
    svg = icon_svg(ICONS, "tiger")
    assert svg.startswith("<svg ") and svg.endswith("<circle r='3'/></svg>")
    assert view_box(svg) == ("0 0 36 36", "36", "36")
    # A wide icon is in the middle of its square.
    assert view_box(icon_svg(ICONS, "flag")) == ("0 -8 48 48", "48", "48")


def test_aliases_are_followed_but_for_turned_ones():
    assert icon_svg(ICONS, "kitten") == icon_svg(ICONS, "tiger")
    for name in ("turned", "loop", "lost", "none"):
        assert icon_svg(ICONS, name) is None


@pytest.mark.parametrize(
    ("code", "name"), [("1f42f", "tiger"), ("2615", "cat"), ("1f42f-fe0f", "tiger")]
)
def test_emoji_are_found_with_and_without_the_variation_selector(code, name):
    assert emoji_svg(ICONS, NAMES, code) == icon_svg(ICONS, name)
    assert emoji_svg(ICONS, NAMES, "1f600") is None
