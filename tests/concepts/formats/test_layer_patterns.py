"""Patterns of layer names in peft configurations."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from customize.concepts.formats.layer_patterns import PatternMatcher, check_pattern
from customize.errors import ConceptError

names = st.lists(st.sampled_from(["a", "ab", "to_q", "0", "10"]), min_size=1, max_size=4).map(
    ".".join
)
patterns = st.one_of(
    names,
    names.map(lambda name: f"^{name}"),
    names.map(lambda name: name.replace(".", r"\.")),
    st.sampled_from([r".*\.to_q", r"a\.\d+", "to_[qk]", "(a|ab)", "ab?", ".*", "a$", r"\w+\.10"]),
)


@given(st.lists(patterns, max_size=4, unique=True), names)
def test_patterns_match_as_in_peft(keys: list[str], name: str) -> None:
    numbered = dict(zip(keys, range(len(keys)), strict=True))
    expected = numbered.get(get_pattern_key(keys, name), "default")
    assert PatternMatcher("a").value(numbered, [name], "default") == expected


def test_patterns_match_any_name_of_a_layer() -> None:
    matcher = PatternMatcher("a")
    assert matcher.value({"^text_model.a": 1}, ["a", "text_model.a"], 0) == 1


def test_exponential_backtracking_is_stopped() -> None:
    matcher = PatternMatcher("some.file", seconds=0.2)
    start = time.monotonic()
    with pytest.raises(ConceptError, match=r"take more than .* to match.*some\.file"):
        for number in range(50):
            matcher.value({r"((a|b|ab)+)+c": 1}, [f"{'ab' * 60}c{number}"], 0)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("pattern", ["(", "a" * 10**5, "a{2", "[", "\\"])
def test_invalid_patterns_are_refused(pattern: str) -> None:
    if pattern == "a{2":  # a literal brace, in both libraries
        check_pattern(pattern, "a")
        return
    with pytest.raises(ConceptError, match="not a regular expression") as error:
        check_pattern(pattern, "a")
    assert len(str(error.value)) < 1000
