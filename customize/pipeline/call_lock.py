"""Which calls may use the same models at the same time.

A call claims the objects that it uses: some shared, such as models that it only reads, some
exclusively, such as a scheduler that it steps. It waits until no other call has a claim that
excludes its own. All claims of a call are granted at once, so calls on different objects do not
block one another, and they are granted in the order in which they were asked for, so none starves.

A call made inside another one (in a callback, in a step) has the outer call's claims, and does not
queue behind calls that wait for the outer one. Context variables tell which call is inside which.
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

#: Seconds after which a call that still waits says so, and what it waits for.
WARN_AFTER = 30.0


@dataclass(frozen=True)
class LockRequest:
    """The objects that a call uses, told apart by identity.

    Attributes:
        shared: with other calls that use them so.
        exclusive: by no other call at the same time.
    """

    shared: Iterable[object] = ()
    exclusive: Iterable[object] = ()


@dataclass(eq=False)
class _Claim:
    """A claim that waits or has been granted.

    Attributes:
        within: the granted claims of the calls that this call is inside of.
        objects: what is claimed; held, so that no other object gets its id.
        thread: the name of the thread that the call is made in.
    """

    within: tuple[_Claim, ...]
    thread: str = field(default_factory=lambda: threading.current_thread().name)
    shared: frozenset[int] = frozenset()
    exclusive: frozenset[int] = frozenset()
    objects: tuple[object, ...] = ()

    def update(self, uses: LockRequest) -> None:
        shared, exclusive = tuple(uses.shared), tuple(uses.exclusive)
        self.objects = (*shared, *exclusive)
        self.exclusive = frozenset(map(id, exclusive))
        self.shared = frozenset(map(id, shared)) - self.exclusive

    def excludes(self, other: _Claim) -> bool:
        if self is other or self in other.within or other in self.within:
            return False
        return bool(
            self.exclusive & (other.exclusive | other.shared) or self.shared & other.exclusive
        )


@dataclass
class _Table:
    """All claims of the process; read and changed with ``changed`` held only."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    granted: list[_Claim] = field(default_factory=list)
    waiting: list[_Claim] = field(default_factory=list)

    def blocking(self, claim: _Claim) -> list[_Claim]:
        """The granted claims that exclude this one."""
        return [other for other in self.granted if claim.excludes(other)]

    def can_start(self, claim: _Claim) -> bool:
        if self.blocking(claim):
            return False
        if claim.within:  # who waits may be waiting for the outer call, which waits for this one
            return True
        earlier = self.waiting[: self.waiting.index(claim)]
        return not any(claim.excludes(other) for other in earlier)

    def is_deadlocked(self, claim: _Claim) -> bool:
        """Whether what blocks this claim waits, by way of calls inside it, for this claim's outer
        calls."""
        seen: set[int] = set()
        todo = self.blocking(claim)
        while todo:
            other = todo.pop()
            if other in claim.within:
                return True
            if id(other) not in seen:
                seen.add(id(other))
                inside = (each for each in self.waiting if other in each.within)
                todo += [blocker for each in inside for blocker in self.blocking(each)]
        return False


_TABLE = _Table()
_CLAIMS: ContextVar[tuple[_Claim, ...]] = ContextVar("customize_claims", default=())


@contextmanager
def acquire(uses: Callable[[], LockRequest]) -> Iterator[None]:
    """Within it, no other call has claims that exclude this one's.

    Args:
        uses: what to claim; asked again whenever other calls have ended, as they may have changed
            what this one needs. It is asked under a lock of the whole process: keep it short.

    Raises:
        PipelineError: two calls, each inside another call, would wait for one another for ever.
    """
    table = _TABLE
    outer = _CLAIMS.get()
    # The copied context of a task may be older than the calls that it was made in.
    claim = _Claim(within=tuple(each for each in outer if each in table.granted))
    is_told = False
    try:
        with table.changed:
            table.waiting.append(claim)
            claim.update(uses())
            while not table.can_start(claim):
                if claim.within and table.is_deadlocked(claim):
                    raise PipelineError(
                        "this call is inside a call of a pipeline and needs the models for itself, "
                        "and so does a call of another thread, which is inside of one as well: "
                        "they would wait for one another for ever",
                        fix="load concepts, and give regions= and avoid=, outside of callbacks "
                        "where several threads share models",
                    )
                if not table.changed.wait(WARN_AFTER) and not is_told:
                    is_told = True
                    _tell_waiting(table, claim)
                claim.update(uses())
            table.granted.append(claim)
            table.waiting.remove(claim)
        _CLAIMS.set((*claim.within, claim))
        yield
    finally:
        _CLAIMS.set(outer)
        with table.changed:
            for claims in (table.waiting, table.granted):
                if claim in claims:
                    claims.remove(claim)
            claim.objects = ()  # contexts that were copied meanwhile hold the claim
            table.changed.notify_all()


def is_nested() -> bool:
    """Whether the call is made inside another one that has claims."""
    return len(_CLAIMS.get()) > 1


def _tell_waiting(table: _Table, claim: _Claim) -> None:
    """Log what a call has waited for so long. It may be a long call; or a call whose callback
    waits for this thread, of which nothing here can know."""
    threads = sorted({other.thread for other in table.blocking(claim)})
    threads = threads or sorted({o.thread for o in table.waiting if claim.excludes(o)})
    logger.warning(
        "a call in the thread %s has waited %g s for a call on the same models in %s; if a "
        "callback or a step of that one waits for this thread, neither ever ends: start such "
        "threads by asyncio.to_thread or contextvars.copy_context().run, or wait for them after "
        "the call",
        claim.thread,
        WARN_AFTER,
        ", ".join(threads),
    )


def _after_fork() -> None:
    """Of the parent's threads only the one that forked exists in the child, with its claims."""
    _TABLE.changed = threading.Condition()
    _TABLE.granted[:] = _CLAIMS.get()
    _TABLE.waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
