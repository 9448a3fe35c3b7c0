"""The running call of a pipeline in this context, and which computations belong to it.

Context variables follow threads and tasks. A callback's own calls of pipelines are not part of the
call that the callback was passed to, so each run of a callback gets a scope of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customize.pipeline.state import AttachedState


@dataclass(frozen=True)
class RunningCall:
    """The innermost call of a pipeline that is running, and the state that acts on it."""

    pipe: Any
    call: Any
    state: AttachedState | None = None


#: The innermost running call of this context.
RUNNING: ContextVar[RunningCall | None] = ContextVar("customize_running", default=None)

_SCOPE: ContextVar[object] = ContextVar("customize_scope", default=None)


def capture_call_scope() -> Callable[[], bool]:
    """Return a function that checks whether the current computation is part of the present call.

    It returns False in calls that a callback makes on the same models.
    """
    scope = _SCOPE.get()
    return lambda: _SCOPE.get() is scope


@contextmanager
def separate_call_scope() -> Iterator[None]:
    """Compute something inside the context that is not part of the present call."""
    running, scope = RUNNING.set(None), _SCOPE.set(object())
    try:
        yield
    finally:
        RUNNING.reset(running)
        _SCOPE.reset(scope)


def isolate_callback(callback: Any) -> Any:
    """Wrap a callback so that its own calls of pipelines are not part of the present call."""
    if not callable(callback):
        return callback
    if hasattr(callback, "tensor_inputs"):  # diffusers' PipelineCallback, or several of them
        isolated = copy.copy(callback)
        if hasattr(isolated, "callbacks"):
            isolated.callbacks = [isolate_callback(part) for part in callback.callbacks]
        else:
            isolated.callback_fn = isolate_callback(callback.callback_fn)
        return isolated

    @functools.wraps(callback)
    def run_isolated(*args: Any, **kwargs: Any) -> Any:
        with separate_call_scope():
            return callback(*args, **kwargs)

    return run_isolated
