"""The recipes of CONTRIBUTING.md work as written: one new file and one new line.

Each recipe has a block with the new file (``python file=...``), one with the line of the registry
and its import, each after an existing line (``diff file=...``), and one that uses it (``python
check``). They are applied to a copy of the package.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.forked import run_forked
from tests.test_guides import ROOT, Block, read_blocks

#: The recipe that needs trl, an extra.
TRAINING = "A training method of rewriters"
RECIPES = (
    "A merge",
    "A stage",
    "A file format",
    "A model family",
    "A preservation loss",
    TRAINING,
    "A command",
)


def read_recipes() -> dict[str, list[Block]]:
    """Read the blocks of each recipe by its title."""
    path = ROOT / "CONTRIBUTING.md"
    lines = path.read_text().splitlines()
    recipes: dict[str, list[Block]] = {}
    for block in read_blocks(path):
        titles = [line[4:] for line in lines[: block.line] if line.startswith(("## ", "### "))]
        if titles and titles[-1] in RECIPES:
            recipes.setdefault(titles[-1], []).append(block)
    return recipes


def apply_recipe(blocks: list[Block], folder: Path) -> str:
    """Write the file and the line of a recipe into a copy; return the code that uses them."""
    new_file, registry, check = blocks
    path = folder / new_file.words[0].removeprefix("file=")
    assert not path.exists(), path
    path.write_text(new_file.text)
    path = folder / registry.words[0].removeprefix("file=")
    text = path.read_text()
    for hunk in registry.text.split("@@\n"):
        before, added = (f"{line[1:]}\n" for line in hunk.splitlines())
        assert text.count(before) == 1, (path, before)
        text = text.replace(before, before + added)
    path.write_text(text)
    return check.text


def test_recipes_cover_every_extension_point() -> None:
    recipes = read_recipes()
    assert tuple(recipes) == RECIPES
    for title, blocks in recipes.items():
        new_file, registry, check = blocks
        assert (new_file.language, registry.language, check.language) == (
            "python",
            "diff",
            "python",
        ), title
        assert new_file.words[0].startswith("file=customize/"), title
        assert registry.words[0].startswith("file=customize/"), title
        assert check.words == ("check",), title
        added = [line[1:] for line in registry.text.splitlines() if line[0] == "+"]
        assert sum("import" not in line for line in added) == 1, title


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "customize", folder / "customize", ignore=ignored)
    for name in ("assets", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_recipes_work(package: Path) -> None:
    """All recipes share one copy and one process."""
    code = []
    for title, blocks in read_recipes().items():
        if title == TRAINING and importlib.util.find_spec("trl") is None:
            continue
        check = apply_recipe(blocks, package)
        function = re.sub(r"\W", "_", title.lower())
        body = "\n".join(f"    {line}" for line in check.splitlines())
        code.append(f"def {function}():\n{body}\n\n{function}()\n")
    done = run_forked("\n".join(code), folder=package)
    assert done.returncode == 0, done.stderr[-4000:]
