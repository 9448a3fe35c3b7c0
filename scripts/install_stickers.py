"""Install the artwork of the stickers: `make stickers`.

Downloads four emoji sets and their metadata with npm (16 MB), checks their hashes, and draws each
emoji that all sets have as a PNG of 128 x 128 pixels. The artwork goes into the user's cache folder
(CUSTOMIZE_CACHE, or customize in XDG_CACHE_HOME), as `stickers`: a folder with PNGs of each set,
metadata.json, and LICENSE.txt in each folder. Run it again to continue an interrupted installation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from customize.atomic import partial_folder, write_atomic
from customize.errors import ConfigError, CustomizeError, storage_error
from customize.stickers.artwork import METADATA, Subject, artwork_folder
from sticker_artwork.emoji_metadata import NAME_LISTS, read_subjects
from sticker_artwork.emoji_sets import METADATA_NOTICE, EmojiSet, Packages
from sticker_artwork.iconify import emoji_svg
from sticker_artwork.packages import download_package, read_json_members, read_members

#: Side of the pictures in pixels; stickers have at most 56.
SIZE = 128
SOURCES = "sources.json"
_MIT_BLANK = "Copyright (c) <year> <copyright holders>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=artwork_folder())
    folder: Path = parser.parse_args().folder
    try:
        install(folder, Packages())
    except CustomizeError as error:
        sys.exit(f"error: {error}")
    print(f"the artwork is in {folder}")


def install(folder: Path, packages: Packages) -> None:
    """Install all sets into a folder; what is there already is kept.

    Raises:
        CustomizeError: A package cannot be downloaded, differs or lacks a file, or the folder
            cannot be written.
    """
    sources = {str(each): each.sha256 for each in packages.all()} | {"size": SIZE}
    installed = _read_json(folder / METADATA)
    if isinstance(installed, dict) and installed.get("sources") == sources:
        return
    archives = {each: download_package(each, folder / "packages") for each in packages.all()}
    metadata, licenses = archives[packages.metadata], archives[packages.licenses]
    listed = _subjects(metadata)
    pictures = {each: _pictures(archives[each.package], listed) for each in packages.sets}
    subjects = [s for s in listed if all(s.id in drawn for drawn in pictures.values())]
    try:
        for each in packages.sets:
            (text,) = read_json_members(licenses, (f"licenses/{each.hand.license}.json",))
            drawn = {subject.id: pictures[each][subject.id] for subject in subjects}
            _install_set(folder, each, drawn, text["licenseText"], sources)
        (notice,) = read_members(metadata, ("LICENSE",))
        write_atomic(folder / "LICENSE.txt", f"{METADATA_NOTICE}\n\n".encode() + notice)
        content = {
            "hands": [asdict(each.hand) for each in packages.sets],
            "subjects": [asdict(subject) for subject in subjects],
            "sources": sources,
        }
        # Last, because its presence means that the pictures are complete.
        write_atomic(folder / METADATA, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise storage_error(error, folder, "the artwork") from error
    shutil.rmtree(folder / "packages", ignore_errors=True)


def _subjects(archive: Path) -> list[Subject]:
    """The subjects of emojibase's metadata, whether or not all sets have them."""
    names = tuple(f"en/shortcodes/{name}.json" for name in NAME_LISTS)
    emoji, groups, *tables = read_json_members(
        archive, ("en/data.json", "meta/groups.json", *names)
    )
    return read_subjects(emoji, groups, tables)


def _pictures(archive: Path, subjects: list[Subject]) -> dict[str, str]:
    """Id -> SVG of the subjects that a set has."""
    icons, names = read_json_members(archive, ("icons.json", "chars.json"))
    found = ((subject.id, emoji_svg(icons, names, subject.id)) for subject in subjects)
    return {code: svg for code, svg in found if svg is not None}


def _install_set(
    folder: Path, each: EmojiSet, svgs: dict[str, str], text: str, sources: dict[str, Any]
) -> None:
    """Draw the pictures of a set into its folder, all or none."""
    target = folder / each.hand.name
    if _read_json(target / SOURCES) == sources:
        return
    with partial_folder(target) as partial:
        for code, svg in svgs.items():
            (partial / f"{code}.png").write_bytes(draw_png(svg))
        (partial / "LICENSE.txt").write_text(_license(each, text), encoding="utf-8")
        (partial / SOURCES).write_text(json.dumps(sources, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # of other versions
        partial.rename(target)
    print(f"{each.hand.title}: {len(svgs)} pictures", flush=True)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def draw_png(svg: str) -> bytes:
    """Draw an SVG as a PNG of 128 x 128 pixels.

    Raises:
        ConfigError: resvg-py is missing.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise ConfigError(
            "resvg-py, which draws SVG, is missing",
            fix="run `make stickers`, or install the extra stickers: pip install -e '.[stickers]'",
        ) from error
    # Texts would look different on each machine; the sets have none.
    return bytes(svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))


def _license(each: EmojiSet, text: str) -> str:
    """Attribution and text of a set's licence."""
    hand = each.hand
    return (
        f"{hand.title} by {hand.author}\n{each.notice}\n{hand.url}\nLicence: {hand.license}\n\n"
        f"The pictures were drawn from the SVGs of the npm package {each.package}, {SIZE} pixels "
        f"wide, without other changes.\n\n{text.strip().replace(_MIT_BLANK, each.notice)}\n"
    )


if __name__ == "__main__":
    main()
