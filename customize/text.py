"""Escaping and shortening of untrusted text for terminals, messages and Markdown.

Names, captions, class words, paths and metadata of files can contain any characters. On a terminal
escape sequences move the cursor, and bidirectional marks reorder the text. In a model card markup
becomes links, images and tables.
"""

from __future__ import annotations

import re
import reprlib

# Characters with a meaning in Markdown or HTML, also within a word or a bare URL.
_MARKUP = re.compile(r"[\\`*_\[\]<>|&#!~$@:(){}\"']|(?<=www)\.", re.IGNORECASE)


# Limits: the repr of a value with shared parts can be larger than memory.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 12
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 1000


def shorten(text: str, max_length: int) -> str:
    """Shorten a text to at most ``max_length`` characters by replacing its middle with a note."""
    if len(text) <= max_length:
        return text
    note = f" ... ({len(text):,} characters) ... "
    last = max_length // 4
    return text[: max(max_length - last - len(note), 0)] + note + text[len(text) - last :]


def plural(count: int, noun: str) -> str:
    """``"1 concept"``, ``"2 concepts"``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def with_article(words: str) -> str:
    """``"a dog"``, ``"an animal"``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def quote(value: object, max_length: int = 200) -> str:
    """Return the repr of an untrusted value, of at most ``max_length`` characters."""
    if isinstance(value, str | bytes):
        value = value[: max_length + 1]
    try:
        text = _REPR.repr(value)
    except Exception:  # a number of over 4300 digits, or a class whose repr fails
        text = f"a value of type {type(value).__name__}"
    return shorten(text, max_length)


def escape_unprintable(text: str) -> str:
    """Escape all characters except printable ones and newlines, as Python does.

    This removes C0 and C1 control characters, bidirectional and other invisible marks, and lone
    surrogates, which terminals cannot encode.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char == "\n"
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def one_line(text: str) -> str:
    """Escape a text as :func:`escape_unprintable` does, and join its lines."""
    return escape_unprintable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def escape_markdown(text: str) -> str:
    """Escape a text for one line of Markdown or a table cell.

    The text cannot become a link, image, heading, other markup or HTML, nor leave its cell.
    """
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def markdown_code(text: str) -> str:
    """Format a text as a Markdown code span, which is valid in table cells too."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in line else ""
    return fence + space + line.replace("|", "\\|") + space + fence if line else ""
