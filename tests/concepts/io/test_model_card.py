"""Model cards escape texts from other people, so that these are not markup."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import yaml

from customize.concepts.io import model_card
from customize.concepts.merge.write_merged_lora import write_merged
from tests.concepts.making import small

HOSTILE = (
    "<img src=x onerror=alert(1)> ![a](http://evil) [b](http://evil) | `c` www.evil.com @d # e"
)


def rows(text: str) -> str:
    """Everything outside of the front matter and of code blocks."""
    body = text.split("\n---\n", 1)[1]
    return re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)


def check(text: str) -> None:
    head = text.split("---\n")[1]
    assert set(yaml.safe_load(head)) <= {"base_model", "library_name", "instance_prompt", "tags"}
    shown = rows(text)
    assert "<img" not in shown and "](" not in shown.replace("](sample-1.png)", "")
    assert "http://" not in shown and "www." not in shown
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert text.isprintable() or set(text) - {"\n"} == set(filter(str.isprintable, text))


def test_texts_in_a_concept_card_are_escaped() -> None:
    concept = small(
        class_word=HOSTILE[:60],
        base=HOSTILE,
        scores={HOSTILE: HOSTILE, "a\nb": 1.0},
        training={"learned_with": [HOSTILE, "x\n\n# y"]},
        created=HOSTILE[:60],
    )
    text = model_card.concept_card(concept, ["sample-1.png"])
    check(text)
    assert html.unescape(text).count(HOSTILE) >= 3
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == HOSTILE
    code = re.findall(r"```python\n(.*?)\n```", text, flags=re.DOTALL)
    assert len(code) == 2
    for block in code:
        compile(block, "card", "exec")
        assert json.dumps(HOSTILE) in block


def test_texts_in_a_merge_card_are_escaped(tmp_path: Path) -> None:
    both = [small(class_word=HOSTILE[:60], base=HOSTILE, num_tokens=0)]
    folder = write_merged(both, [1.0], tmp_path / "m").folder
    check((folder / "README.md").read_text())
