"""Text of others made harmless: for terminals and messages, for Markdown, and in length.

Names, captions, class words, paths and the metadata of files can hold anything. On a terminal,
escape sequences move the cursor and colour it, and bidirectional marks show a text in another
order than it has. In a model card, markup becomes links, pictures and tables.
"""

from __future__ import annotations

import re
import reprlib

# In Markdown and HTML these begin or end something, also within a word or as a bare address.
_MARKUP = re.compile(r"[\\`*_\[\]<>|&#!~$@:(){}\"']|(?<=www)\.", re.IGNORECASE)


# A value can stand for more than memory holds, where its parts are shared.
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = _REPR.maxdict = 12
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 1000


def shorten(text: str, most: int) -> str:
    """A text of at most so many characters: its middle is left out, with a note that it is."""
    if len(text) <= most:
        return text
    note = f" ... ({len(text):,} characters) ... "
    last = most // 4
    return text[: max(most - last - len(note), 0)] + note + text[len(text) - last :]


def quote(value: object, most: int = 200) -> str:
    """A value from a caller or a file as Python writes it, in at most so many characters."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # not all of it is escaped only to be left out
    try:
        text = _REPR.repr(value)
    except Exception:  # a number of over 4300 digits, or a class whose repr fails
        text = f"a value of type {type(value).__name__}"
    return shorten(text, most)


def escape_unprintable(text: str) -> str:
    """A text with everything but printable characters and newlines escaped, as Python would.

    Of C0 and C1 control characters, bidirectional and other invisible marks, and halves of
    characters, which no terminal can encode, nothing is left.
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
    """The same on a single line."""
    return escape_unprintable(" ".join(line.strip() for line in text.splitlines() if line.strip()))


def escape_markdown(text: str) -> str:
    """A text on one line of Markdown, or in a cell of its tables, that shows as it is.

    It cannot become a link, a picture, a heading, markup or HTML, nor leave its cell.
    """
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", one_line(text))


def markdown_code(text: str) -> str:
    """A text as a span of code in Markdown, also in a cell of its tables."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in line else ""
    return fence + space + line.replace("|", "\\|") + space + fence if line else ""
