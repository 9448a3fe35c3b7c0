"""Packages of three emoji by two hands, and an npm that delivers them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

from customize.stickers.artwork import Hand
from sticker_artwork.emoji_sets import EmojiSet, Packages
from sticker_artwork.packages import Package

NPM = """#!{python}
import shutil, sys
from pathlib import Path
name = sys.argv[2].lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
source = Path({shop!r}) / name
with open({log!r}, "a") as log:
    log.write(name + "\\n")
if not source.is_file():
    sys.exit("npm error 404 no such package")
shutil.copy(source, sys.argv[sys.argv.index("--pack-destination") + 1])
"""
SVG = '<rect x="4" y="8" width="{}" height="20" fill="{}"/>'
CODES = {"1f42f": "tiger", "1f34e": "apple", "1f697": "car"}


def pack(shop: Path, name: str, files: dict[str, object]) -> Package:
    """Write an archive, as `npm pack` makes it, and return the package with its hash."""
    package = Package(name, "1.0.0", "")
    with tarfile.open(shop / package.archive, "w:gz") as tar:
        for member, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    content = (shop / package.archive).read_bytes()
    return replace(package, sha256=hashlib.sha256(content).hexdigest())


def icon_set(shop: Path, name: str, colour: str, codes: dict[str, str]) -> EmojiSet:
    bodies = {icon: {"body": SVG.format(12 + k, colour)} for k, icon in enumerate(codes.values())}
    icons = {"width": 36, "height": 36, "icons": bodies}
    package = pack(shop, f"@icons/{name}", {"icons.json": icons, "chars.json": codes})
    hand = Hand(name, name.title(), "the tests", "MIT", f"https://example.org/{name}")
    return EmojiSet(hand, package, "Copyright (c) the tests")


def make_packages(shop: Path) -> Packages:
    """Fill a folder with archives. The second hand has no car."""
    shop.mkdir()
    emoji = [
        {
            "label": name,
            "hexcode": code.upper(),
            "tags": ["thing"],
            "order": order,
            "group": 0,
            "subgroup": 0,
            "version": 1,
        }
        for order, (code, name) in enumerate(CODES.items())
    ]
    lists = ("emojibase", "github", "iamcal", "joypixels")
    metadata = {
        "LICENSE": "MIT License of the metadata",
        "en/data.json": emoji,
        "meta/groups.json": {"groups": {"0": "objects"}, "subgroups": {"0": "tool"}},
    } | {f"en/shortcodes/{name}.json": {"1F42F": "big_cat"} for name in lists}
    text = "MIT License\n\nCopyright (c) <year> <copyright holders>\n"
    return Packages(
        sets=(
            icon_set(shop, "crayon", "red", CODES),
            icon_set(shop, "marker", "blue", dict(list(CODES.items())[:2])),
        ),
        metadata=pack(shop, "names", metadata),
        licenses=pack(shop, "licenses", {"licenses/MIT.json": {"licenseText": text}}),
    )


def install_npm(folder: Path, shop: Path) -> Path:
    """Write an npm that copies archives from the shop; returns its log."""
    folder.mkdir()
    log, npm = folder / "log", folder / "npm"
    npm.write_text(NPM.format(python=sys.executable, shop=str(shop), log=str(log)))
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    log.touch()
    return log


def path_with(folder: Path) -> str:
    return f"{folder}{os.pathsep}{os.environ['PATH']}"
