"""The tables of scripts/bench/README.md match the results, and figures in READMEs have sources.

A figure is a number with a percent sign or a unit of time, memory or speed, or a decimal below 1,
outside code. The block that states it (text between blank lines, or the comment right after it)
lists it in an HTML comment:

    <!-- figures: 83 % = demo:identity_merged; 0.3 s = merge_solver:... -->
    <!-- settings: 0.9 = customize.references.agreement:KEEP -->
    <!-- not measured: 30 s, 25 % (why, if it is not clear) -->
    <!-- training log: 25.0 dB -->

The value of a source must round to the figure. A setting is a module's constant, or the default of
a field, such as `MODULE:TrainConfig.rank`. Figures in generated tables need no comment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest

from scripts.bench_tables import TABLES
from scripts.bench_tables.results import RESULTS, ROOT, read_figure
from scripts.make_bench_readme import README, render

READMES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "assets/README.md")),
        README,
        *ROOT.glob("customize/**/README.md"),
    )
)
_UNITS = r"%|times\b|ms\b|s\b|minutes?\b|min\b|h\b|MB\b|MiB\b|points\b|dB\b"
_FIGURE = re.compile(
    rf"(?<![\w.:/])(-?(?:\d[\d,]*)?\.?\d+) ?({_UNITS})|(?<![\w.:/-])(-?0?\.\d+)(?![\w.])"
)
_COMMENT = re.compile(r"<!-- (figures|settings|not measured|training log): (.*?) -->", re.DOTALL)


def normalize(figure: str) -> str:
    """ "0.3 s" and "0.3s" alike; "-1" of "-1 to 2 %" keeps its sign."""
    return figure.replace(" ", "").replace(",", "")


def blocks(text: str) -> Iterator[str]:
    """Text between blank lines, without code and generated tables."""
    text = re.sub(r"<!-- table: \w+ -->.*?<!-- end of table -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "code", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`", "code", text)
    yield from re.split(r"\n\s*\n", text)


def figures_in(block: str) -> Iterator[str]:
    prose = re.sub(r"<!--.*?-->", "", block, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    for match in _FIGURE.finditer(prose):
        yield normalize(match[0])
    # "96 to 100 %": the first number shares the unit.
    for match in re.finditer(rf"(?<![\w.])(-?[\d.]+) to [-\d.]+ ?({_UNITS})", prose):
        yield normalize(match[1] + match[2])


def read_setting(source: str) -> float:
    """The value of ``MODULE:NAME`` or the default of ``MODULE:CLASS.FIELD``."""
    module, _, names = source.partition(":")
    value: Any = import_module(module)
    for name in names.split("."):
        fields = getattr(value, "model_fields", {})
        value = fields[name].default if name in fields else getattr(value, name)
    return float(value)


_READERS: dict[str, Callable[[str], float]] = {"figures": read_figure, "settings": read_setting}


def listed(block: str) -> tuple[dict[str, list[tuple[str, float]]], set[str]]:
    """Figure -> its sources with their values; and the figures without one that say why."""
    sources: dict[str, list[tuple[str, float]]] = {}
    excused: set[str] = set()
    for kind, content in _COMMENT.findall(block):
        if kind in _READERS:
            for entry in filter(None, (part.strip() for part in content.split(";"))):
                figure, source = entry.split(" = ", 1)
                source = " ".join(source.split())
                value = _READERS[kind](source)
                sources.setdefault(normalize(figure), []).append((source, value))
        else:
            content = re.sub(r"\(.*?\)", "", content, flags=re.DOTALL)
            excused |= {normalize(part.strip()) for part in content.split(",")}
    return sources, excused


def matches(figure: str, value: float) -> bool:
    """Whether a value rounds to a figure as it is written."""
    number = re.match(r"-?[\d,]*\.?\d+", figure)
    assert number is not None, figure
    digits = number[0].replace(",", "")
    scale = 100.0 if figure[number.end() :] in ("%", "points") else 1.0
    places = len(digits.partition(".")[2])
    return abs(scale * value - float(digits)) <= 0.5 * 10**-places + 1e-9


@pytest.mark.parametrize("readme", READMES)
def test_figures_have_sources(readme: str) -> None:
    missing, wrong = [], []
    for block in blocks((ROOT / readme).read_text()):
        sources, excused = listed(block)
        for figure in figures_in(block):
            if figure not in sources and figure not in excused:
                missing.append((figure, " ".join(block.split())[:80]))
        for figure, values in sources.items():
            wrong += [
                f"{figure} = {name}: {value}"
                for name, value in values
                if not matches(figure, value)
            ]
    assert not missing
    assert not wrong


def test_tables_match_the_results() -> None:
    text = README.read_text()
    assert render(text) == text, "run python scripts/make_bench_readme.py"


def test_all_tables_are_shown() -> None:
    names = re.findall(r"<!-- table: (\w+) -->", README.read_text())
    assert sorted(names) == sorted(TABLES)


def test_all_results_are_listed() -> None:
    text = README.read_text()
    for path in RESULTS.glob("*.json"):
        assert f"results/{path.name}" in text, path


@pytest.mark.parametrize(
    ("figure", "value", "expected"),
    [("83%", 0.8333, True), ("84%", 0.8333, False), ("0.3s", 0.3013, True), (".86", 0.8611, True)],
)
def test_rounding(figure: str, value: float, expected: bool) -> None:
    assert matches(figure, value) is expected


@pytest.mark.parametrize(
    "source", ["demo", "none:identity", "demo:none", "demo:leak[model=none]", "demo:leak[k=1"]
)
def test_unknown_sources_are_refused(source: str) -> None:
    with pytest.raises(LookupError):
        read_figure(source)


def test_settings_are_read_from_the_code() -> None:
    assert read_setting("customize.references.agreement:MIN_IMAGES") == 3
    field = "customize.training.references.config:ReferenceTrainConfig.drop_text"
    sources, excused = listed(f"In 5 % of samples. <!-- settings: 5 % = {field} -->")
    assert sources == {"5%": [(field, 0.05)]}
    assert not excused
    with pytest.raises(AttributeError):
        read_setting("customize.references.agreement:NONE")


def test_a_figure_without_a_source_is_found() -> None:
    (block,) = blocks("It keeps 83 % in 1.5 s; version 3.11, Wan 2.1, weight `0.5`.")
    assert list(figures_in(block)) == ["83%", "1.5s"]
    assert list(figures_in("0.86 against .67")) == ["0.86", ".67"]
