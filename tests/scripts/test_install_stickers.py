"""Installation of artwork: what it writes, and that it continues where it was cut off."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from customize.atomic import is_partial
from customize.errors import DataError
from customize.stickers.artwork import METADATA, read_artwork
from scripts import install_stickers
from sticker_artwork.emoji_sets import Packages
from tests.scripts.sticker_artwork.making import install_npm, make_packages, path_with

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the npm of the tests is a script")


@pytest.fixture
def shop(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    install_npm(tmp_path / "bin", tmp_path / "shop")
    monkeypatch.setenv("PATH", path_with(tmp_path / "bin"))
    return tmp_path / "shop"


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_artwork_has_what_all_hands_draw(shop, tmp_path):
    folder = tmp_path / "cache" / "stickers"
    install_stickers.install(folder, make_packages(shop))
    artwork = read_artwork(folder)
    assert [hand.name for hand in artwork.hands] == ["crayon", "marker"]
    assert [subject.name for subject in artwork.subjects] == ["tiger", "apple"]
    assert artwork.subjects[0].synonyms == ("big cat",)
    picture = artwork.picture("1f42f", "marker")
    # 12 x 20 of 36 units, on 128 pixels.
    assert np.abs(np.subtract(picture.size, (12 * 128 / 36, 20 * 128 / 36))).max() < 2
    assert picture.getpixel((10, 10)) == (0, 0, 255, 255)
    assert sorted(p.name for p in folder.iterdir()) == [
        *("LICENSE.txt", "crayon", "marker", METADATA)
    ]
    assert sorted(p.name for p in (folder / "crayon").iterdir()) == [
        *("1f34e.png", "1f42f.png", "LICENSE.txt", "sources.json")
    ]


def test_licences_lie_beside_the_artwork(shop, tmp_path):
    install_stickers.install(tmp_path / "art", make_packages(shop))
    text = (tmp_path / "art/crayon/LICENSE.txt").read_text()
    for part in ("Crayon by the tests", "https://example.org/crayon", "@icons/crayon@1.0.0"):
        assert part in text
    assert text.count("Copyright (c) the tests") == 2 and "<year>" not in text
    assert "MIT License of the metadata" in (tmp_path / "art/LICENSE.txt").read_text()


def test_a_finished_installation_downloads_nothing(shop, tmp_path):
    packages, folder = make_packages(shop), tmp_path / "art"
    install_stickers.install(folder, packages)
    before, log = content(folder), (tmp_path / "bin/log").read_text()
    install_stickers.install(folder, packages)
    assert content(folder) == before
    assert (tmp_path / "bin/log").read_text() == log


def test_an_interrupted_installation_continues(shop, tmp_path, monkeypatch):
    packages, folder = make_packages(shop), tmp_path / "art"
    draw, count = install_stickers.draw_png, 0

    def cut_off(svg):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return draw(svg)

    monkeypatch.setattr(install_stickers, "draw_png", cut_off)
    with pytest.raises(KeyboardInterrupt):
        install_stickers.install(folder, packages)
    assert not (folder / METADATA).exists() and not (folder / "marker").exists()
    log = (tmp_path / "bin/log").read_text()
    install_stickers.install(folder, packages)
    assert count == 4 + 2  # the second hand alone
    assert (tmp_path / "bin/log").read_text() == log  # nothing twice
    assert not [p for p in folder.rglob("*") if is_partial(p.name)]
    assert len(read_artwork(folder).subjects) == 2


def test_other_versions_replace_what_is_installed(shop, tmp_path):
    packages, folder = make_packages(shop), tmp_path / "art"
    install_stickers.install(folder, packages)
    install_stickers.install(
        folder, Packages(packages.sets[:1], packages.metadata, packages.licenses)
    )
    artwork = read_artwork(folder)
    assert [subject.name for subject in artwork.subjects] == ["tiger", "apple", "car"]
    assert artwork.picture("1f697", "crayon").size[1] > 60


def test_a_set_that_differs_stops_the_installation(shop, tmp_path):
    packages = make_packages(shop)
    (shop / packages.metadata.archive).write_bytes(b"something else")
    with pytest.raises(DataError, match="SHA-256"):
        install_stickers.install(tmp_path / "art", packages)
    assert not (tmp_path / "art" / METADATA).exists()


def test_the_versions_that_are_installed_have_hashes_and_hands_have_licences():
    packages = Packages()
    assert all(len(each.sha256) == 64 for each in packages.all())
    hands = [each.hand for each in packages.sets]
    assert [h.name for h in hands if h.held_out] == ["openmoji"]
    assert all(h.license and h.author and h.url.startswith("https://") for h in hands)
    assert json.dumps([str(each) for each in packages.all()]).count("@") >= len(packages.all())
