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
        if re.match(r"\| `\w+` \| .* \| (flow|epsilon, v|v) \|", line)
    ]
    assert [row[0].strip("`") for row in rows] == list(FAMILIES)
    for (name, _, prediction, dictionaries), family in zip(rows, FAMILIES.values(), strict=True):
        if issubclass(family, FlowFamily):
            assert prediction == "flow", name
        else:  # what the scheduler's configuration says; v in all models of CogVideoX
            assert prediction == ("v" if name == "`cogvideox`" else "epsilon, v"), name
        found = re.findall(r"`(\w+)`", dictionaries)
        assert found == list(family.clip_encoders), name
        assert found or dictionaries == "none", name
