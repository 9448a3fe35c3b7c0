"""README.md and the guides: their code runs as written, their links and figures are right.

The words of a fence after its language say how the block is tested:

- ``file=NAME``: the block is the content of that file.
- ``check``: the use of a recipe in CONTRIBUTING.md; run by test_contributing.py.
- ``make``: commands of make, whose targets must exist; they are not run.
- ``hub``: needs models of the Hugging Face hub. Its commands are parsed, not run.
- ``slow``: takes minutes; run only by ``make test-slow``.

All other blocks run in the order of their file, Python blocks in one namespace, in a folder where
tiny models replace those of the hub. ``make test`` limits drawing and training to two steps,
without samples and shared directions; ``make test-slow`` runs the text unchanged.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from customize.concepts.io.write_concept import save_concept
from scripts.bench._worlds import drawings
from tests.pipeline.making import concept, user_lora
from tests.recording import record_in_one_step
from tests.references.storybook_model import storybook_references
from tests.tiny import tiny_sdxl
from tests.tiny_rewriter import save_tiny_llama

ROOT = Path(__file__).parents[1]
GUIDES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("customize/**/README.md"))
)
MODES = {"slow", "hub", "make", "check"}
STEPS = 2


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, its text and its line."""

    language: str
    words: tuple[str, ...]
    text: str
    line: int


def read_blocks(path: Path) -> list[Block]:
    text = path.read_text()
    blocks = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(match[1], tuple(match[2].split()), match[3], line))
    return blocks


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, as lists of words."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def shorten(text: str) -> str:
    """Shorten training in the text of a shell block."""
    fast = f" --steps {STEPS} --no-samples --num-shared-directions 0"
    lines = text.replace("\\\n", " ").splitlines()
    return "\n".join(line + fast * line.startswith("customize train") for line in lines)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the demo's, with concepts trained for one step."""
    import customize
    from customize.demo.experiment import NAMES, TRAINING
    from customize.storybook.example_concepts import BUNDLED

    folder = tmp_path_factory.mktemp("demo")
    few = {"steps": 1, "warmup_steps": 0, "num_shared_directions": 0, "samples": False}
    with pytest.MonkeyPatch.context() as patch:
        draw_few_steps(patch)
        for index, name in enumerate(NAMES):
            customize.train(
                base=str(ROOT / "assets/storybook"),
                images=ROOT / "assets/concepts" / name,
                output=folder / "concepts" / name,
                name=name,
                class_word=BUNDLED[name][0],
                slice=index,
                **TRAINING | few,
                progress=False,
            )
    return folder


def draw_few_steps(patch: pytest.MonkeyPatch) -> None:
    """Limit all schedulers to two steps, and recordings of layer inputs to one."""
    import diffusers

    record_in_one_step(patch)

    for name in ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"):
        scheduler = getattr(diffusers, name)

        def set_timesteps(
            self: Any,
            number: Any = None,
            *args: Any,
            original: Any = scheduler.set_timesteps,
            **kw: Any,
        ) -> None:
            kw = {k: min(v, STEPS) if k == "num_inference_steps" else v for k, v in kw.items()}
            original(self, *([] if number is None else [min(number, STEPS)]), *args, **kw)

        patch.setattr(scheduler, "set_timesteps", set_timesteps)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled reference model, or a random one."""
    return storybook_references(tmp_path_factory.mktemp("references") / "references")


@pytest.fixture
def workplace(
    tmp_path: Path, demo: Path, references: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, with all files that the guides name."""
    for name in ("pipelines", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "assets").mkdir()
    for path in (*(ROOT / "assets").iterdir(), references):
        if not (tmp_path / "assets" / path.name).exists():
            (tmp_path / "assets" / path.name).symlink_to(path)
    monkeypatch.setattr("customize.storybook.bundled_assets.references_folder", lambda: references)
    shutil.copytree(demo, tmp_path / "demo")
    shutil.copytree(ROOT / "assets/concepts/rex", tmp_path / "photos/rex")
    star = drawings.DRAWINGS[0]
    (tmp_path / "photos/star").mkdir()
    for number, photo in enumerate(drawings.photos(star, seed=0)):
        photo.image.save(tmp_path / f"photos/star/{number}.png")
    (tmp_path / "stable-diffusion-v1-5").mkdir()
    (tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5").symlink_to(ROOT / "assets/storybook")
    monkeypatch.setenv("CUSTOMIZE_CACHE", str(tmp_path / "cache"))
    save_tiny_llama(tmp_path / "cache/smollm2-135m-instruct")
    sdxl = tiny_sdxl()
    sdxl.save_pretrained(tmp_path / "stabilityai/stable-diffusion-xl-base-1.0")
    for index, name in enumerate(("dog-sdxl", "cat-sdxl")):
        save_concept(concept(sdxl, name, index=index), tmp_path / "concepts" / name)
    (tmp_path / "downloads").mkdir()
    save_file(storybook_lora(), tmp_path / "downloads/watercolor.safetensors")
    monkeypatch.chdir(tmp_path)
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", modules)
    return tmp_path


def storybook_lora() -> dict[str, torch.Tensor]:
    from diffusers import DiffusionPipeline

    return user_lora(DiffusionPipeline.from_pretrained(ROOT / "assets/storybook"))


def run_command(words: list[str], folder: Path) -> None:
    """Run one line of a shell block; commands of customize run in this process, which is faster."""
    if words[0] == "customize":
        from customize.cli import main

        assert main(words[1:]) == 0, words
        return
    if words[:2] == ["accelerate", "launch"]:
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words[2:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])


def run_guide(guide: str, folder: Path, as_written: bool) -> Iterator[dict[str, Any]]:
    """Run the blocks of a guide; after each Python block, its variables, its last value as "_"."""
    variables: dict[str, Any] = {"__name__": "guide"}
    for block in read_blocks(ROOT / guide):
        files = [word.removeprefix("file=") for word in block.words if word.startswith("file=")]
        if files:
            (folder / files[0]).write_text(block.text)
        elif {"hub", "make", "check"} & set(block.words) or (
            "slow" in block.words and not as_written
        ):
            continue
        elif block.language == "python":
            run_python(block.text, f"{guide}:{block.line}", variables)
            yield variables
        elif block.language == "bash":
            for words in commands(block.text if as_written else shorten(block.text)):
                run_command(words, folder)


def run_python(text: str, name: str, variables: dict[str, Any]) -> None:
    *statements, last = ast.parse(text).body
    variables["_"] = None
    if isinstance(last, ast.Expr):
        exec(compile(ast.Module(statements, []), name, "exec"), variables)
        variables["_"] = eval(compile(ast.Expression(last.value), name, "eval"), variables)
    else:
        exec(compile(text, name, "exec"), variables)


def has_code(guide: str) -> bool:
    return any(block.language in ("bash", "python") for block in read_blocks(ROOT / guide))


PIPELINES = "customize/pipeline/README.md"
RUNNABLE = [
    guide for guide in GUIDES if has_code(guide) and guide not in (PIPELINES, "CONTRIBUTING.md")
]


@pytest.mark.parametrize("guide", RUNNABLE)
def test_blocks_run(guide: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_few_steps(monkeypatch)
    for _ in run_guide(guide, workplace, as_written=False):
        pass


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("guide", RUNNABLE)
def test_blocks_run_as_written(guide: str, workplace: Path) -> None:
    for _ in run_guide(guide, workplace, as_written=True):
        pass


def test_pipelines_guide_attaches_concepts(workplace: Path) -> None:
    attached = []
    for variables in run_guide(PIPELINES, workplace, as_written=True):
        assert variables["_"].size in ((32, 32), (64, 64))
        attached.append([(row.name, row.weight) for row in variables["pipe"].custom.rows])
    assert attached == [
        [("dog-sdxl", 1.0), ("cat-sdxl", 0.8)],
        [("dog-sdxl", 0.8)],
        [("rex", 1.0)],
    ]


@pytest.mark.parametrize("guide", GUIDES)
def test_blocks_are_marked(guide: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for block in read_blocks(ROOT / guide):
        where = f"{guide}:{block.line}"
        marks = {word for word in block.words if not word.startswith("file=")}
        assert marks <= MODES, where
        assert block.language in ("python", "bash", "yaml", "text", "diff"), where
        if block.language == "yaml":
            assert any(word.startswith("file=") for word in block.words), where
        if "make" in marks:
            for words in commands(block.text):
                if words[0] == "make":
                    assert {w for w in words[1:] if "=" not in w} <= targets, (where, words)


@pytest.mark.parametrize("guide", GUIDES)
def test_options_of_commands_exist(guide: str) -> None:
    """Options in blocks that are not run and in the text exist."""
    import typer

    from customize.cli.app import app

    root: Any = typer.main.get_command(app)
    for block in read_blocks(ROOT / guide):
        if block.language == "bash" and "hub" in block.words:
            for words in commands(block.text):
                if words[0] == "customize":
                    command = root.commands[words[1]]
                    command.make_context(words[1], words[2:]).close()


@pytest.mark.parametrize("guide", [*GUIDES, "scripts/bench/README.md", "assets/README.md"])
def test_link_targets_exist(guide: str) -> None:
    path = ROOT / guide
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), (guide, target)
        if anchor:
            assert anchor in anchors(linked), (guide, target)


def anchors(path: Path) -> Iterator[str]:
    """The anchors that GitHub gives the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    for guide in GUIDES:
        assert guide in (ROOT / "README.md").read_text() or guide == "README.md", guide


def test_presets_table() -> None:
    """Cells contain the precision and memory of the preset files."""
    text = (ROOT / "customize/training/README.md").read_text()
    cells = {}
    for name, *row in re.findall(r"^\| `([\w-]+)` \|" + r"([^|]*)\|" * 4 + "$", text, re.MULTILINE):
        for card, cell in zip(("8gb", "12gb", "16gb", "24gb"), row, strict=True):
            if cell.strip():
                cells[f"{name}-{card}"] = cell.strip()
    presets = {}
    for path in (ROOT / "scripts/presets").glob("*.yaml"):
        content = path.read_text()
        counted = re.search(r"Counted: ([\d.]+ GB)", content)
        precision = re.search(r"^quantize: (\w+)", content, re.MULTILINE)
        assert counted is not None, path
        presets[path.stem] = f"{precision[1] if precision else 'bf16'} ({counted[1]})"
    assert cells == presets
