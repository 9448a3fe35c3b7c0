"""The page of an evolution: each prompt with its rewritings, their scores and pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from customize.atomic import write_atomic
from customize.text import escape_unprintable
from customize.training.rewriting.evolution import Member, Population

_STYLE = (
    "body{font:14px system-ui;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;text-align:left;vertical-align:top;border-top:1px solid #ccc}"
    "td.number{text-align:right;font-variant-numeric:tabular-nums}"
    "img{height:96px;margin-right:4px}tr.own{background:#f4f4e8}"
)


def write_sheet(path: Path, populations: Sequence[Population], pictures: str = "pictures") -> None:
    """Write the page.

    Args:
        path: The HTML file.
        populations: The populations.
        pictures: Folder of the pictures, relative to the page.

    Raises:
        StorageError: The file cannot be written.
    """
    sections = "\n".join(_section(population, pictures) for population in populations)
    page = (
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Evolution of prompts</title>"
        f"<style>{_STYLE}</style><h1>Evolution of prompts</h1>\n{sections}\n</html>\n"
    )
    write_atomic(path, page.encode())


def _section(population: Population, pictures: str) -> str:
    names = list(dict.fromkeys(name for m in population.members for name in m.rewards))
    head = "".join(
        f"<th>{_text(name)}" for name in ("total", *names, "round", "prompt", "pictures")
    )
    scored = population.best(len(population.members))
    failed = [member for member in population.members if member.total is None]
    rows = "\n".join(
        _row(member, names, pictures, member.text == population.prompt)
        for member in (*scored, *failed)
    )
    note = f"<p>{population.dropped} answers were dropped." if population.dropped else ""
    return f"<h2>{_text(population.prompt)}</h2>{note}<table><tr>{head}\n{rows}</table>"


def _row(member: Member, names: Sequence[str], pictures: str, is_own: bool) -> str:
    values = [member.total, *(member.rewards.get(name) for name in names)]
    numbers = "".join(
        f"<td class=number>{'' if value is None else format(value, '.3f')}" for value in values
    )
    images = "".join(
        f'<img src="{html.escape(f"{pictures}/{name}")}" loading=lazy>' for name in member.pictures
    )
    text = _text(member.text) + (f"<br>({_text(member.failure)})" if member.failure else "")
    kind = " class=own" if is_own else ""
    return f"<tr{kind}>{numbers}<td class=number>{member.round}<td>{text}<td>{images}"


def _text(text: str) -> str:
    return html.escape(escape_unprintable(text))
