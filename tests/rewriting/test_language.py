"""Whether two texts are in one language."""

from __future__ import annotations

import pytest

from customize.rewriting.language import main_script, same_language


@pytest.mark.parametrize(
    ("text", "script"),
    [("a dog", "LATIN"), ("собака", "CYRILLIC"), ("犬とビーチ", "CJK"), ("123 !", None)],
)
def test_scripts(text, script):
    assert main_script(text) == script


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a photo of a dog on a beach", "a dog that runs on the wide beach", True),
        ("un chien rouge sur la plage avec un chapeau", "a red dog on the beach with a hat", False),
        ("un chien rouge sur la plage", "un grand chien rouge sur une plage", True),
        ("dog", "Hund", True),  # too short to tell
        ("<rex>", "<rex> on a beach", True),
        ("海边的狗", "a dog at the sea", False),
    ],
)
def test_languages(first, second, same):
    assert same_language(first, second) is same
