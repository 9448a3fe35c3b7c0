"""Matching of peft's ``rank_pattern`` and ``alpha_pattern`` with layer names."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from customize.concepts.concept_info import MAX_NAME
from customize.errors import ConceptError

#: Seconds for matching all patterns of one file: a regular expression from an untrusted file may
#: backtrack exponentially.
TIME_LIMIT = 5.0
_FIX = "ask its maker for a file whose configuration names each layer"

# Without repetitions and alternatives, so that the standard library matches them in linear time.
_PLAIN = re.compile(r"[A-Za-z0-9_.\\^$-]+")


class PatternMatcher:
    """Matches the patterns of one file within a time limit.

    Attributes:
        where: Path of the file, for messages.
        seconds_left: Seconds left for expressions with repetitions.
    """

    def __init__(self, where: object, seconds: float = TIME_LIMIT) -> None:
        self.where = where
        self.seconds_left = seconds

    def value(self, patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
        """Look up the value of the first pattern that matches a layer, as in peft 0.21.

        A pattern is a regular expression that matches from the beginning of a name or after a dot
        to its end (``peft.utils.get_pattern_key``).

        Args:
            patterns: Pattern -> value, in the file's order.
            names: All names of the layer.
            default: The value if no pattern matches.

        Raises:
            ConceptError: If a pattern is not a regular expression, or takes too long.
        """
        for pattern, value in patterns.items():
            if any(self._matches(pattern, name) for name in names):
                return value
        return default

    def _matches(self, pattern: str, name: str) -> bool:
        try:
            if _PLAIN.fullmatch(pattern):
                return _compile_plain(pattern).match(name) is not None
            start = time.monotonic()
            try:
                return _compile_general(pattern).match(name, timeout=self.seconds_left) is not None
            finally:
                # Zero would mean no limit.
                self.seconds_left = max(self.seconds_left - (time.monotonic() - start), 1e-3)
        except TimeoutError as error:
            raise ConceptError(
                f"the patterns of the adapter's configuration take more than {TIME_LIMIT:g} s to "
                f"match, the last one {pattern[:MAX_NAME]}",
                where=self.where,
                fix=_FIX,
            ) from error


def check_pattern(pattern: str, where: object) -> None:
    """Check that a pattern is a regular expression.

    Raises:
        ConceptError: If it cannot be compiled, or is longer than any layer name.
    """
    reason = f"it has {len(pattern)} characters" if len(pattern) > MAX_NAME else ""
    if not reason:
        try:
            (_compile_plain if _PLAIN.fullmatch(pattern) else _compile_general)(pattern)
        except Exception as error:  # two libraries' errors, RecursionError, MemoryError
            reason = str(error)[:MAX_NAME] or type(error).__name__
    if reason:
        raise ConceptError(
            "the adapter's configuration has a pattern that is not a regular expression for a "
            f"layer's name: {pattern[:MAX_NAME]} ({reason})",
            where=where,
            fix=_FIX,
        )


@functools.lru_cache(maxsize=2**12)
def _compile_plain(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


@functools.lru_cache(maxsize=2**10)
def _compile_general(pattern: str) -> Any:
    import regex  # has a time limit, unlike the standard library's

    return regex.compile(rf"(.*\.)?({pattern})$")
