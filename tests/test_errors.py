from __future__ import annotations

import copy
import errno
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from customize import errors
from customize.errors import ConceptError, ConfigError, CustomizeError

FAMILY = [getattr(errors, name) for name in errors.__all__]
texts = st.text(max_size=60)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"what": "rank must be positive"}, "rank must be positive."),
        ({"what": "rank must be positive."}, "rank must be positive."),
        ({"what": "no such file", "where": Path("a/b.json")}, "no such file (a/b.json)."),
        (
            {"what": "unknown basis 'dtc'", "where": "basis", "fix": "use 'dct' or 'qr'"},
            "unknown basis 'dtc' (basis). Do: use 'dct' or 'qr'.",
        ),
        ({"what": "disk full", "fix": "free 2 GB."}, "disk full. Do: free 2 GB."),
        ({"what": "two\n  lines\n", "where": "x\ny"}, "two lines (x y)."),
    ],
)
def test_message_says_what_where_and_what_to_do(arguments, shown):
    assert str(CustomizeError(**arguments)) == shown


def test_attributes_are_kept():
    error = ConceptError("wrong shape", where=Path("c.safetensors"), fix="train it again")
    assert (error.what, error.where, error.fix) == (
        "wrong shape",
        "c.safetensors",
        "train it again",
    )


def test_every_class_is_of_the_family_and_listed():
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(kind, CustomizeError) for kind in FAMILY)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_survives_pickling_and_copying(kind, again):
    # A live object that cannot be pickled is a fair thing to name as the place.
    error = again(kind("bad", where=lambda: None, fix="mend it"))
    assert type(error) is kind
    assert (error.what, error.fix) == ("bad", "mend it")
    assert error.where is not None
    assert "lambda" in str(error)


def test_names_from_files_cannot_steer_the_terminal():
    shown = str(ConceptError("bad token '\x1b[31mrex\x07'", where="evil\x1b]0;name"))
    assert "\x1b" not in shown
    assert "\\x1b[31mrex" in shown


@given(what=texts, where=st.none() | texts, fix=st.none() | texts)
def test_always_one_printable_line(what, where, fix):
    shown = str(ConfigError(what, where=where, fix=fix))
    assert shown.isprintable()


def test_keyword_only_so_that_places_and_fixes_are_not_mixed_up():
    with pytest.raises(TypeError):
        CustomizeError("bad", "somewhere")  # type: ignore[misc]


class Wrapped(Exception):
    """An error of another library."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: the quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "the disk is full, or a limit on the size"),
        (OSError(errno.EROFS, "Read-only file system"), "the disk is read-only"),
        (Wrapped("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Wrapped("Read-only file system (os error 30)"), "the disk is read-only"),
        (Wrapped("database or disk is full"), "the disk is full"),
        (Wrapped("[enforce fail] . No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "it cannot be written: Permission denied"),
    ],
    ids=str,
)
def test_a_full_disk_is_called_that_whoever_says_it(error, reason):
    made = errors.storage_error(error, "place")
    assert str(made).startswith(reason) and "(place)" in str(made) and "Do: " in str(made)
    told = str(errors.storage_error(error, "place", "the checkpoint of step 1"))
    assert told.startswith("the checkpoint of step 1 cannot be written: ")
    assert errors.system_errno(Wrapped("anything else")) is None
