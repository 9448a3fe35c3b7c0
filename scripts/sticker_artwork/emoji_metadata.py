"""Subjects of stickers from the metadata of emojibase (MIT): names, synonyms, keywords, groups."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from customize.stickers.artwork import Subject

#: Skin tones and hair, and flags, which are no drawings.
SKIPPED_GROUPS = frozenset({"component", "flags"})
#: emojibase's files of names that messengers give to emoji.
NAME_LISTS = ("emojibase", "github", "iamcal", "joypixels")
MAX_WORDS = 4


def plain_words(text: str) -> str:
    """Lower-case words of a to z and digits: "Piñata’s T-Rex" -> "pinatas t rex"."""
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    return " ".join(re.findall(r"[a-z0-9]+", re.sub(r"['’]", "", text)))


def read_subjects(
    emoji: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, str]],
    names: Sequence[Mapping[str, Any]],
) -> list[Subject]:
    """Subjects in the order of the emoji standard.

    Args:
        emoji: Of `data.json`: label, hexcode, tags, group and subgroup of each emoji.
        groups: Of `groups.json`: names of groups and subgroups by number.
        names: Of each name list: hexcode -> one or several names with underscores.
    """
    subjects = []
    for entry in sorted(emoji, key=lambda entry: entry.get("order", 0)):
        group = groups["groups"].get(str(entry.get("group")), "component")
        if group in SKIPPED_GROUPS:
            continue
        code, name = entry["hexcode"], plain_words(entry["label"])
        synonyms = []
        for table in names:
            listed = table.get(code, ())
            for text in (listed,) if isinstance(listed, str) else listed:
                words = plain_words(text)
                # Digits number variants, as in "dog2".
                if words and not re.search(r"\d", words) and len(words.split()) <= MAX_WORDS:
                    synonyms.append(words)
        keywords = [plain_words(tag) for tag in entry.get("tags", ())]
        subjects.append(
            Subject(
                id=code.lower(),
                name=name,
                synonyms=tuple(dict.fromkeys(text for text in synonyms if text != name)),
                keywords=tuple(
                    word
                    for word in dict.fromkeys(keywords)
                    if re.fullmatch(r"[a-z]{3,}", word) and word not in name.split()
                ),
                group=group,
                subgroup=groups["subgroups"][str(entry["subgroup"])],
                version=float(entry["version"]),
            )
        )
    return subjects
