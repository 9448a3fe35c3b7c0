"""Untrusted text on terminals and in Markdown."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize.errors import MAX_LOCATION_LENGTH, MAX_MESSAGE_LENGTH, CustomizeError
from customize.text import (
    escape_markdown,
    escape_unprintable,
    markdown_code,
    one_line,
    quote,
    shorten,
)

ANY = st.text(st.characters(exclude_categories=()))
HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x9b31m",
    "\x1b]8;;http://evil\x07link\x1b]8;;\x07",
    "a\rb",
    "a\u202egnp.exe",
    "a\u2066b\u2069",
    "zero\u200bwidth\ufeff",
    "half \ud800",
    "\u2028line\u2029",
    "\U000e0041tag",
    "nul\0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_escape_unprintable_leaves_printable_text(text):
    for shown in (
        escape_unprintable(text),
        one_line(text),
        escape_markdown(text),
        markdown_code(text),
    ):
        assert all(char.isprintable() or char == "\n" for char in shown)
        shown.encode()
    assert str(CustomizeError(text, where=text, fix=text)).isprintable()


@given(ANY)
def test_one_line_is_printable(text):
    assert one_line(text).isprintable()
    one_line(text).encode()


@given(ANY)
def test_escape_markdown_shows_the_text(text):
    shown = escape_markdown(text)
    assert html.unescape(shown) == html.unescape(html.escape(one_line(text)))
    assert not re.search(r"[\\`*_\[\]<>|!~@:(){}\"']|www\.", shown, re.IGNORECASE)


@given(st.text("`a| "))
def test_markdown_code_cannot_be_closed(text):
    shown = markdown_code(text)
    if not one_line(text):
        assert shown == ""
        return
    fence = re.match("`+", shown)[0]
    inside = shown[len(fence) : -len(fence)]
    assert shown.endswith(fence) and fence not in inside
    assert not re.search(r"(?<!\\)\|", inside)


def test_ordinary_text_is_unchanged():
    for text in ("a dog", "Größe 12, naïve", "犬", "a-b.c"):
        assert escape_unprintable(text) == one_line(text) == escape_markdown(text) == text
        assert markdown_code(text) == f"`{text}`"
    assert escape_unprintable("a\nb") == "a\nb" and one_line(" a\n\n b ") == "a b"


def test_length_limits():
    assert shorten("a" * 100, 100) == "a" * 100
    long = shorten("a" * 500 + "z" * 500, 100)
    assert len(long) == 100 and "(1,000 characters)" in long
    assert long.startswith("a") and long.endswith("z")
    assert quote("x" * 10**7, 50).startswith("'x") and len(quote("x" * 10**7, 50)) == 50
    assert quote(10**5000) == "a value of type int" and quote([1, "a"]) == "[1, 'a']"
    error = CustomizeError("\x1b" * 10**6, where="\u202e" * 10**6, fix="y" * 10**6)
    assert len(str(error)) < 2 * MAX_MESSAGE_LENGTH + MAX_LOCATION_LENGTH + 20
    assert len(error.problem) <= MAX_MESSAGE_LENGTH and len(repr(error)) < 5 * MAX_MESSAGE_LENGTH
