"""Reservations, facts and index rows with arbitrary values are read correctly or refused."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.concepts.concept_info import BasisInfo
from customize.concepts.io.file_layout import RESERVATION_FILE
from customize.concepts.io.read_concept import read_info
from customize.concepts.io.write_concept import save_concept
from customize.concepts.library import index
from customize.concepts.library.index import describe_concept, read_index, scan_stamps
from customize.concepts.library.library import Library
from customize.concepts.library.library_check import check_library
from customize.concepts.slices.allocation import find_collisions, free_index, slice_owners
from customize.concepts.slices.slice_reservations import SliceReservation, read_reservations
from customize.errors import ConceptError
from tests.concepts.making import small

HUGE = 10**400
DEEP = "[" * 20_000 + "]" * 20_000
# Placeholder for a nesting that parsers accept and recursive code may not.
NESTED = "nested"


def written(value: Any) -> str:
    return json.dumps(value).replace(f'"{NESTED}"', "[" * 900 + "]" * 900)


odd = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -1, 2**63, 1e308, float("inf"), float("nan"), "\x00", "\ud800"])
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
) | st.just(NESTED)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    return [path, *(inner_path for key, part in inner for inner_path in paths(part, (*path, key)))]


@st.composite
def mutated(draw, value: Any) -> Any:
    """A JSON value with one or two parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        candidates = paths(value)
        path = draw(st.sampled_from(candidates))
        if not path:
            return draw(odd)
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        kind = draw(st.sampled_from(["put", "put", "take", "add"]))
        if kind == "put":
            parent[path[-1]] = draw(odd)
        elif kind == "take":
            del parent[path[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=6))] = draw(odd)
        else:
            parent.append(draw(odd))
    return value


def check_message(error: ConceptError, path: Any) -> None:
    assert error.where and str(path) in error.where and error.fix and len(str(error)) < 2000


RESERVATION = SliceReservation(
    name="rex",
    basis=BasisInfo(num_shared_directions=1),
    rank=2,
    index=1,
    slices={"64": [2, 3], "96": [2, 3]},
).model_dump(mode="json")


@settings(deadline=None, max_examples=100)
@given(mutated(RESERVATION))
def test_mutated_reservation_is_valid_or_refused(tmp_path_factory, value):
    library = tmp_path_factory.mktemp("library")
    (library / "rex").mkdir()
    path = library / "rex" / RESERVATION_FILE
    path.write_text(written(value))
    try:
        reservations = read_reservations(library)
    except ConceptError as error:
        check_message(error, path)
        return
    assert 0 <= free_index(slice_owners(library), 2, BasisInfo(num_shared_directions=1)) < 48
    assert find_collisions(reservations) == []


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 10**30},
        {"rank": 0},
        {"name": "../rex"},
        {"name": "rex\nfake"},
        {"slices": {"64": [2, 2]}},
        {"slices": {"64": [-1, 0]}},
        {"slices": {"64": [0, 64]}},
        {"slices": {"9999999": list(range(100_000))}},
        {"slices": {"0": [0, 1]}},
        {"basis": {"kind": "cosine", "seed": 2**64, "scale": 1.0}},
    ],
)
def test_invalid_reservations_are_refused(change, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / RESERVATION_FILE).write_text(json.dumps(RESERVATION | change))
    with pytest.raises(ConceptError, match="slice reservation"):
        read_reservations(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_concept(small(), tmp_path_factory.mktemp("facts") / "rex")


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_mutated_facts_are_valid_or_refused(folder, tmp_path_factory, data):
    whole = json.loads((folder / "concept.json").read_text())
    value = data.draw(mutated(whole))
    library = tmp_path_factory.mktemp("library")
    (library / "rex").mkdir()
    path = library / "rex" / "concept.json"
    path.write_text(written(value))
    try:
        info = read_info(path.parent)
        assert info.name
    except ConceptError as error:
        check_message(error, path)
    entry = describe_concept(library, "rex", scan_stamps(library)["rex"])
    assert entry.name
    check_library(library)


@pytest.mark.parametrize("text", [DEEP, '{"training": ' + DEEP + "}", "9" * 5000, "", "nan", '"'])
def test_unparsable_facts_and_reservations_are_refused(text, tmp_path):
    (tmp_path / "rex").mkdir()
    (tmp_path / "rex" / "concept.json").write_text(text)
    with pytest.raises(ConceptError) as caught:
        read_info(tmp_path / "rex")
    check_message(caught.value, "concept.json")
    (tmp_path / "rex" / RESERVATION_FILE).write_text(text)
    with pytest.raises(ConceptError, match="slice reservation"):
        read_reservations(tmp_path)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_mutated_index_is_valid_or_rebuilt(folder, tmp_path_factory, data):
    library = tmp_path_factory.mktemp("library")
    shutil.copytree(folder, library / "rex")
    right = Library(library).entries
    with_row = index._format_row

    column = data.draw(st.sampled_from(list(index._COLUMNS)))

    def row(entry):
        values = dict(zip(index._COLUMNS, with_row(entry), strict=True))
        if column in index._JSON:
            values[column] = written(data.draw(mutated(json.loads(values[column])))).encode()
        else:
            values[column] = data.draw(st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=20))
        return list(values.values())

    index._format_row = row  # so that the checksum is right
    try:
        index.write_index(library, right.values())
    finally:
        index._format_row = with_row
    for entry in read_index(library).values():
        for width, columns in entry.slices.items():
            assert int(width) > 0 and all(column >= 0 for column in columns)
    report = check_library(library)
    assert report.library.entries.keys() == right.keys()
