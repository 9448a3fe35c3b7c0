"""A readers-writer lock over the objects that calls use, such as models and schedulers.

A call locks some objects shared, such as models that it only reads, and some exclusively, such as a
scheduler that it steps. It waits until no other call has a lock that excludes its own. All locks of
a call are granted at once, so calls on different objects do not block one another, and in the order
of the requests, so none starves.

A call made inside another one (in a callback, in a step) has the outer call's locks, and does not
queue behind calls that wait for the outer one. Context variables record which call is inside which.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from customize.errors import PipelineError

logger = logging.getLogger(__name__)

#: Seconds after which a waiting call logs what it waits for.
WARN_AFTER = 30.0


@dataclass(frozen=True)
class LockRequest:
    """The objects that a call locks, by identity.

    Attributes:
        shared: Objects that other calls may lock shared at the same time.
        exclusive: Objects that no other call may lock at the same time.
    """

    shared: Iterable[object] = ()
    exclusive: Iterable[object] = ()


@dataclass(eq=False)
class _Lock:
    """The lock of one call, waiting or granted.

    Attributes:
        outer: Granted locks of the calls that this call is inside.
        thread: Name of the thread that makes the call.
        shared: Ids of the objects that are locked shared.
        exclusive: Ids of the objects that are locked exclusively.
        objects: The locked objects; referenced, so that no other object gets their ids.
    """

    outer: tuple[_Lock, ...]
    thread: str = field(default_factory=lambda: threading.current_thread().name)
    shared: frozenset[int] = frozenset()
    exclusive: frozenset[int] = frozenset()
    objects: tuple[object, ...] = ()

    def update(self, request: LockRequest) -> None:
        """Take the objects of a request."""
        shared, exclusive = tuple(request.shared), tuple(request.exclusive)
        self.objects = (*shared, *exclusive)
        self.exclusive = frozenset(map(id, exclusive))
        self.shared = frozenset(map(id, shared)) - self.exclusive

    def excludes(self, other: _Lock) -> bool:
        """Return whether both cannot be granted at the same time."""
        if self is other or self in other.outer or other in self.outer:
            return False
        return bool(
            self.exclusive & (other.exclusive | other.shared) or self.shared & other.exclusive
        )


@dataclass
class _Table:
    """All locks of the process; read and changed with the condition ``changed`` acquired."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    granted: list[_Lock] = field(default_factory=list)
    waiting: list[_Lock] = field(default_factory=list)

    def find_blocking(self, lock: _Lock) -> list[_Lock]:
        """Return the granted locks that exclude this one."""
        return [other for other in self.granted if lock.excludes(other)]

    def is_grantable(self, lock: _Lock) -> bool:
        """Return whether a waiting lock can be granted now."""
        if self.find_blocking(lock):
            return False
        if lock.outer:  # earlier calls may wait for the outer call, which waits for this one
            return True
        earlier = self.waiting[: self.waiting.index(lock)]
        return not any(lock.excludes(other) for other in earlier)

    def is_deadlocked(self, lock: _Lock) -> bool:
        """Return whether calls inside those that block this lock wait for its outer calls."""
        visited: set[int] = set()
        blocking = self.find_blocking(lock)
        while blocking:
            other = blocking.pop()
            if other in lock.outer:
                return True
            if id(other) not in visited:
                visited.add(id(other))
                for waiting in self.waiting:
                    if other in waiting.outer:
                        blocking += self.find_blocking(waiting)
        return False


_TABLE = _Table()
_LOCKS: ContextVar[tuple[_Lock, ...]] = ContextVar("customize_locks", default=())


@contextmanager
def acquire(make_request: Callable[[], LockRequest]) -> Iterator[None]:
    """Lock objects for the block, waiting until no other call has a lock that excludes this one.

    Args:
        make_request: Returns what to lock. It is called again whenever other calls have ended, as
            they may have changed what this one needs, and under a lock of the whole process, so it
            must be short.

    Raises:
        PipelineError: Two calls, each inside another call, would wait for one another forever.
    """
    table = _TABLE
    outer = _LOCKS.get()
    # The copied context of a task may be older than the calls that it was made in.
    lock = _Lock(outer=tuple(earlier for earlier in outer if earlier in table.granted))
    has_warned = False
    try:
        with table.changed:
            table.waiting.append(lock)
            lock.update(make_request())
            while not table.is_grantable(lock):
                if lock.outer and table.is_deadlocked(lock):
                    raise PipelineError(
                        "this call is inside a call of a pipeline and needs the models for itself, "
                        "and so does a call of another thread, which is inside of one as well: "
                        "they would wait for one another for ever",
                        fix="load concepts, and give regions= and avoid=, outside of callbacks "
                        "where several threads share models",
                    )
                if not table.changed.wait(WARN_AFTER) and not has_warned:
                    has_warned = True
                    _log_waiting(table, lock)
                lock.update(make_request())
            table.granted.append(lock)
            table.waiting.remove(lock)
        _LOCKS.set((*lock.outer, lock))
        yield
    finally:
        _LOCKS.set(outer)
        with table.changed:
            for locks in (table.waiting, table.granted):
                if lock in locks:
                    locks.remove(lock)
            lock.objects = ()  # contexts that were copied meanwhile still refer to the lock
            table.changed.notify_all()


def is_nested() -> bool:
    """Return whether the present call is inside another one that has locks."""
    return len(_LOCKS.get()) > 1


def _log_waiting(table: _Table, lock: _Lock) -> None:
    """Log which threads a call waits for: a long call, or one whose callback waits for this thread.

    The latter cannot be detected here.
    """
    blocking = table.find_blocking(lock) or [o for o in table.waiting if lock.excludes(o)]
    threads = sorted({other.thread for other in blocking})
    logger.warning(
        "a call in the thread %s has waited %g s for a call on the same models in %s; if a "
        "callback or a step of that one waits for this thread, neither ever ends: start such "
        "threads by asyncio.to_thread or contextvars.copy_context().run, or wait for them after "
        "the call",
        lock.thread,
        WARN_AFTER,
        ", ".join(threads),
    )


def _after_fork() -> None:
    """Drop the locks of the parent's threads: only the one that forked exists in the child."""
    _TABLE.changed = threading.Condition()
    _TABLE.granted[:] = _LOCKS.get()
    _TABLE.waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
