"""Claims of calls on what they share, with real threads."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.errors import PipelineError
from customize.pipeline import call_lock
from customize.pipeline.call_lock import _TABLE, LockRequest, acquire

SOON, NEVER = 60.0, 0.1  # seconds: until something must have happened, and in which it must not


class Thing:
    """Something that calls claim."""


class Claimer:
    """A thread that claims something until it is told to end."""

    def __init__(self, **uses: list[object]) -> None:
        self.started, self.end, self.error = threading.Event(), threading.Event(), None
        self.uses = LockRequest(**uses)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with acquire(lambda: self.uses):
                self.started.set()
                self.end.wait(SOON)
        except PipelineError as error:
            self.error = error

    def finish(self) -> None:
        self.end.set()
        self.thread.join(SOON)
        assert not self.thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert _TABLE.granted == [] and _TABLE.waiting == []


def test_shared_locks_coexist_and_exclusive_locks_do_not():
    thing = Thing()
    readers = [Claimer(shared=[thing]) for _ in range(3)]
    assert all(reader.started.wait(SOON) for reader in readers)
    writer = Claimer(exclusive=[thing])
    late = Claimer(shared=[thing])  # not before the writer, who would wait for ever
    other = Claimer(exclusive=[Thing()])
    assert other.started.wait(SOON)
    assert not writer.started.wait(NEVER) and not late.started.is_set()
    for reader in readers:
        reader.finish()
    assert writer.started.wait(SOON) and not late.started.wait(NEVER)
    writer.finish()
    assert late.started.wait(SOON)
    late.finish()
    other.finish()


def test_nested_calls_inherit_locks_and_do_not_queue():
    thing, other = Thing(), Thing()
    with acquire(lambda: LockRequest(shared=[thing])):
        writer = Claimer(exclusive=[thing])
        assert not writer.started.wait(NEVER)
        with (
            acquire(lambda: LockRequest(shared=[thing])),
            acquire(lambda: LockRequest(exclusive=[thing, other])),
        ):
            assert not writer.started.is_set()
    assert writer.started.wait(SOON)
    writer.finish()


def test_nested_calls_wait_for_other_threads():
    thing = Thing()
    reader = Claimer(shared=[thing])
    assert reader.started.wait(SOON)
    done: list[str] = []

    def upgrade() -> None:
        with (
            acquire(lambda: LockRequest(shared=[thing])),
            acquire(lambda: LockRequest(exclusive=[thing])),
        ):
            done.append("alone")

    thread = threading.Thread(target=upgrade)
    thread.start()
    time.sleep(NEVER)
    assert not done
    reader.finish()
    thread.join(SOON)
    assert done == ["alone"]


def run_all(*functions: Callable[[], None]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=(function,), daemon=True) for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive(), "deadlock"
    return errors


@pytest.mark.parametrize("same", [True, False])
def test_deadlocks_raise_an_error(same):
    first, second = Thing(), Thing()
    if same:
        second = first
    both = threading.Barrier(2, timeout=SOON)

    def call(outer: Thing, inner: Thing) -> None:
        with acquire(lambda: LockRequest(shared=[outer])):
            both.wait()
            with acquire(lambda: LockRequest(exclusive=[inner])):
                pass

    errors = run_all(lambda: call(first, second), lambda: call(second, first))
    assert len(errors) == 1 and isinstance(errors[0], PipelineError)
    assert "wait for one another for ever" in str(errors[0])


def test_errors_and_interrupts_release_locks():
    thing = Thing()
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), acquire(lambda: LockRequest(exclusive=[thing])):
            raise error
        with pytest.raises(error), acquire(lambda error=error: exec_raise(error)):
            raise AssertionError("never begins")
    Claimer(exclusive=[thing]).finish()


def exec_raise(error: type[BaseException]) -> LockRequest:
    raise error


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells start background jobs, which the tests may be in, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_waiting_calls_leave_the_queue(interruptible):
    thing = Thing()
    writer = Claimer(exclusive=[thing])
    assert writer.started.wait(SOON)
    timer = threading.Timer(NEVER, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), acquire(lambda: LockRequest(shared=[thing])):
        raise AssertionError("never begins")
    writer.finish()


def test_requests_are_made_again_after_waiting():
    thing, request = Thing(), {"uses": LockRequest(shared=())}
    first = Claimer(exclusive=[thing])
    assert first.started.wait(SOON)
    request["uses"] = LockRequest(shared=[thing])
    claims: list[frozenset[int]] = []

    def call() -> None:
        with acquire(lambda: request["uses"]):
            claims.append(_TABLE.granted[-1].exclusive)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(NEVER)
    assert not claims
    request["uses"] = LockRequest(exclusive=[thing])
    first.finish()
    thread.join(SOON)
    assert claims == [frozenset({id(thing)})]


def test_contexts_of_ended_calls_are_ignored():
    thing = Thing()
    with acquire(lambda: LockRequest(exclusive=[thing])):
        context = contextvars.copy_context()
    writer = Claimer(exclusive=[thing])
    assert writer.started.wait(SOON)
    began = threading.Event()

    def late() -> None:
        with acquire(lambda: LockRequest(shared=[thing])):
            began.set()

    thread = threading.Thread(target=context.run, args=(late,))
    thread.start()
    assert not began.wait(NEVER)
    writer.finish()
    thread.join(SOON)
    assert began.is_set()


def test_copied_contexts_keep_no_objects_of_ended_calls():
    thing = Thing()
    ref = weakref.ref(thing)
    with acquire(lambda one=thing: LockRequest(exclusive=[one])):
        context = contextvars.copy_context()
    del thing
    gc.collect()
    assert context is not None and ref() is None


def test_long_waits_are_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(call_lock, "WARN_AFTER", 0.05)
    thing = Thing()

    def late() -> None:
        with acquire(lambda: LockRequest(shared=[thing])):
            pass

    thread = threading.Thread(target=late, name="late")
    with caplog.at_level("WARNING"), acquire(lambda: LockRequest(exclusive=[thing])):
        thread.start()  # as a callback may do, which then waits for it
        thread.join(4 * NEVER)
        assert thread.is_alive()
    thread.join(SOON)
    assert not thread.is_alive()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "in the thread late has waited" in message
    assert f"in {threading.current_thread().name};" in message and "asyncio.to_thread" in message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forks_drop_locks_of_other_threads():
    thing = Thing()
    writer = Claimer(exclusive=[thing])
    assert writer.started.wait(SOON)
    child = os.fork()
    if child == 0:
        with acquire(lambda: LockRequest(exclusive=[thing])):
            os._exit(7)
    writer.finish()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=3),
        min_size=2,
        max_size=6,
    )
)
def test_exclusive_locks_exclude_all_other_calls(jobs):
    things = [Thing() for _ in range(4)]
    inside: dict[int, list[tuple[int, bool]]] = {number: [] for number in range(4)}
    wrong: list[str] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def call(index: int, job: list[tuple[int, bool]]) -> None:
        shared = [things[number] for number, alone in job if not alone]
        exclusive = [things[number] for number, alone in job if alone]
        access = {n: any(alone for k, alone in job if k == n) for n, _ in job}
        for _ in range(5):
            with acquire(lambda: LockRequest(shared, exclusive)):
                for number, alone in access.items():
                    inside[number].append((index, alone))
                for number, alone in access.items():
                    others = [entry for entry in list(inside[number]) if entry[0] != index]
                    if others and (alone or any(exclusive_too for _, exclusive_too in others)):
                        wrong.append(f"{index} and {others} in {number}")
                for number, alone in access.items():
                    inside[number].remove((index, alone))

    try:
        errors = run_all(*(lambda w=w, j=j: call(w, j) for w, j in enumerate(jobs)))
    finally:
        sys.setswitchinterval(interval)
    assert not errors and not wrong
