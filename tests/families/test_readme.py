"""The README's table of families, held against the code."""

from __future__ import annotations

import re
from pathlib import Path

from customize.families import FAMILIES
from customize.families.flow import FlowFamily

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_families_is_true() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.read_text().splitlines()
        if re.match(r"\| `\w+` \| .* \| (flow|epsilon, v) \|", line)
    ]
    assert [row[0].strip("`") for row in rows] == list(FAMILIES)
    for (name, _, prediction, dictionaries), family in zip(rows, FAMILIES.values(), strict=True):
        assert prediction == ("flow" if issubclass(family, FlowFamily) else "epsilon, v"), name
        found = re.findall(r"`(\w+)`", dictionaries)
        assert found == list(family.clip_encoders), name
        assert found or dictionaries == "none", name
