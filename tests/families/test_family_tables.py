"""The tables of families in README.md and the families' guide match the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from customize.families import FAMILIES
from customize.families.rectified_flow import RectifiedFlowFamily
from tests import tiny, tiny_llm, tiny_video

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "customize/families/README.md"


@pytest.mark.parametrize("path", [ROOT / "README.md", GUIDE], ids=["README", "guide"])
def test_families_table(path: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in path.read_text().splitlines()
        if re.match(r"\| `\w+` \| .* \| (flow|epsilon, v|v) \|", line)
    ]
    assert [row[0].strip("`") for row in rows] == list(FAMILIES)
    for (name, _, prediction, dictionaries), family in zip(rows, FAMILIES.values(), strict=True):
        if issubclass(family, RectifiedFlowFamily):
            assert prediction == "flow", name
        else:  # by the scheduler's configuration; v in all models of CogVideoX
            assert prediction == ("v" if name == "`cogvideox`" else "epsilon, v"), name
        encoders = re.findall(r"`(\w+)`", dictionaries)
        assert encoders == list(family.clip_encoders), name
        assert encoders or dictionaries == "none", name


MAKERS = {
    name.removeprefix("tiny_"): make
    for module in (tiny, tiny_llm, tiny_video)
    for name, make in vars(module).items()
    if name.startswith("tiny_")
}
EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
REFERENCES = ("ip_adapter_image", "image")


@pytest.mark.parametrize("name", FAMILIES)
def test_call_arguments_table(name: str) -> None:
    (row,) = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in GUIDE.read_text().splitlines()
        if re.match(rf"\| `{name}` \| .* \| .* \| (yes|no) \|", line)
    )
    pipe = MAKERS[name]()
    if FAMILIES[name].modular_only:
        taken = {block_input.name for block_input in pipe.blocks.inputs}
        between = {o.name for b in pipe.blocks.sub_blocks.values() for o in b.intermediate_outputs}
        assert row[1].endswith(", between its steps")
    else:
        taken = between = set(inspect.signature(type(pipe).__call__).parameters)
    assert re.findall("`([a-z_]+)`", row[1]) == [name for name in EMBEDDINGS if name in between]
    references = [name for name in REFERENCES if name in taken]
    assert row[2] == (", ".join(f"`{name}`" for name in references) or "none")
    # test_regions.py checks every family with "yes".
    assert row[3] == ("no" if FAMILIES[name].regions_unsupported else "yes")
