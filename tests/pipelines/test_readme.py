"""The README's lines on modular pipelines and ``custom_pipeline=``, run as written.

Tiny models and concepts lie where those that it names would be.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.making import concept
from tests.tiny import tiny_sd, tiny_sdxl

ROOT = Path(__file__).parents[2]


def snippets() -> list[str]:
    text = (ROOT / "README.md").read_text()
    part = re.search(r"### Modular pipelines and.*?\n(?=## )", text, re.DOTALL)
    assert part is not None
    return re.findall(r"```python\n(.*?)```", part[0], re.DOTALL)


def test_the_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdxl, sd = tiny_sdxl(), tiny_sd()
    sdxl.save_pretrained(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0")
    sd.save_pretrained(tmp_path / "assets" / "storybook")
    concept(sdxl).save(tmp_path / "concepts" / "rex")
    concept(sdxl, "tom", index=1).save(tmp_path / "concepts" / "tom")
    concept(sd).save(tmp_path / "demo" / "concepts" / "rex")
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    monkeypatch.chdir(tmp_path)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", modules)
    attached = []
    for code in snippets():
        *lines, last = ast.parse(code).body
        found: dict[str, Any] = {}
        exec(compile(ast.Module(lines, []), "README", "exec"), found)
        assert isinstance(last, ast.Expr)
        drawn = eval(compile(ast.Expression(last.value), "README", "eval"), found)
        assert (drawn[0] if isinstance(drawn, list) else drawn).size == (32, 32)
        attached.append([(row.name, row.weight) for row in found["pipe"].custom.rows])
    assert attached == [[("rex", 1.0), ("tom", 0.8)], [("rex", 0.8)], [("rex", 1.0)]]
