"""Whether two texts are in one language."""

from __future__ import annotations

import numpy as np
import pytest

from customize.rewriting.language import main_script, same_language
from customize.storybook.user_prompts import KINDS, write_user_prompt


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
        ("ein Hund am Strand", "a dog on the beach", False),
        ("a dog on the beach", "ein Hund am Strand", False),
        ("un chien sur la plage", "dog on beach", False),
        ("una chica en el bosque", "a girl in the forest", False),
        ("um cachorro na praia", "a photo of a dog on a beach", False),
        ("een hond op het strand", "a dog on the beach", False),
        ("en hund på stranden", "a dog on the beach", False),
        ("ein Hund am Strand", "un chien sur la plage", False),
        ("ein Hund am Strand", "ein großer Hund am Meer", True),
        ("en hund på stranden", "en glad hund på en solig strand", True),
        ("un perro en la playa", "un perro feliz en la playa al atardecer", True),
        ("samurai, katana, bokeh, kimono", "a samurai in a kimono with a katana, bokeh", True),
        ("la la land poster", "a poster of the film La La Land", True),
        ("el greco style portrait", "a portrait in the style of an old master", True),
        ("croissant", "flaky pastry on a plate by the window", True),
    ],
)
def test_languages(first, second, same):
    assert same_language(first, second) is same


def test_no_prompt_of_the_storybook_is_in_another_language_than_its_caption():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for held_out in (False, True):
            prompts = [write_user_prompt(rng, kind, held_out, trigger="<rex>") for _ in range(30)]
            assert all(same_language(each.text, each.caption) for each in prompts)
