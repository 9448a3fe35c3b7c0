"""Messages of the exception classes."""

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
        ({"problem": "rank must be positive"}, "rank must be positive."),
        ({"problem": "rank must be positive."}, "rank must be positive."),
        ({"problem": "no such file", "where": Path("a/b.json")}, "no such file (a/b.json)."),
        (
            {"problem": "unknown basis 'dtc'", "where": "basis", "fix": "use 'dct' or 'qr'"},
            "unknown basis 'dtc' (basis). Fix: use 'dct' or 'qr'.",
        ),
        ({"problem": "disk full", "fix": "free 2 GB."}, "disk full. Fix: free 2 GB."),
        ({"problem": "no x", "fix": "did you mean y?"}, "no x. Fix: did you mean y?"),
        ({"problem": "two\n  lines\n", "where": "x\ny"}, "two lines (x y)."),
    ],
)
def test_message_has_problem_location_and_fix(arguments, shown):
    assert str(CustomizeError(**arguments)) == shown


def test_attributes():
    error = ConceptError("wrong shape", where=Path("c.safetensors"), fix="train it again")
    assert (error.problem, error.where, error.fix) == (
        "wrong shape",
        "c.safetensors",
        "train it again",
    )


def test_every_exception_class_is_exported():
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(kind, CustomizeError) for kind in FAMILY)


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_pickling_and_copying(kind, again):
    # A live object that cannot be pickled is a fair thing to name as the place.
    error = again(kind("bad", where=lambda: None, fix="mend it"))
    assert type(error) is kind
    assert (error.problem, error.fix) == ("bad", "mend it")
    assert error.where is not None
    assert "lambda" in str(error)


def test_control_characters_in_messages_are_escaped():
    shown = str(ConceptError("bad token '\x1b[31mrex\x07'", where="evil\x1b]0;name"))
    assert "\x1b" not in shown
    assert "\\x1b[31mrex" in shown


@given(problem=texts, where=st.none() | texts, fix=st.none() | texts)
def test_message_is_one_printable_line(problem, where, fix):
    shown = str(ConfigError(problem, where=where, fix=fix))
    assert shown.isprintable()


def test_where_and_fix_are_keyword_only():
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
def test_storage_error_recognizes_a_full_or_readonly_disk(error, reason):
    converted = errors.storage_error(error, "place")
    assert (
        str(converted).startswith(reason)
        and "(place)" in str(converted)
        and "Fix: " in str(converted)
    )
    message = str(errors.storage_error(error, "place", "the checkpoint of step 1"))
    assert message.startswith("the checkpoint of step 1 cannot be written: ")
    assert errors.system_errno(Wrapped("anything else")) is None
