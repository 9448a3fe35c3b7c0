"""What calls of a customized pipeline can ask for beside the pipeline's own arguments.

A *stage* takes a call and gives a call. It knows no pipeline class: a call is a dict by the names
of the arguments, standard pipelines' and modular ones' alike.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from customize.hosts.finite import watched

Call = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One thing that is done to calls.

    Attributes:
        arguments: names of the keyword arguments that it adds to the pipeline's; None where a call
            leaves one out.
        run: ``run(pipe, call, **arguments)`` is a context manager that gives the call that is to
            be made in its place, and undoes after it whatever else it did. It runs at each call,
            whether its arguments are given or not, and may not change the dict that it is given.
    """

    arguments: tuple[str, ...]
    run: Callable[..., AbstractContextManager[Call]]


def staged(call: Any, stages: Sequence[Stage]) -> Any:
    """A pipeline's ``__call__`` with the arguments of stages, which run in their order."""
    signature = inspect.signature(call)
    own = [name for stage in stages for name in stage.arguments]

    @functools.wraps(call)
    def staged_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {name: kwargs.pop(name, None) for name in own}
        # A wrong argument is the pipeline's own TypeError, before anything is done.
        asked = _by_name(signature.bind(self, *args, **kwargs))
        pipe = asked.pop("self")
        with ExitStack() as stack:
            for stage in stages:
                mine = {name: given[name] for name in stage.arguments}
                asked = stack.enter_context(stage.run(pipe, asked, **mine))
            return watched(pipe, functools.partial(call, pipe, **asked))

    staged_call.__signature__ = _with(signature, own)  # type: ignore[attr-defined]
    return staged_call


def _by_name(bound: inspect.BoundArguments) -> Call:
    found: Call = {}
    for name, value in bound.arguments.items():
        rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        found.update(value if rest else {name: value})
    return found


def _with(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """A signature with more keywords, which editors then show."""
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, kind, default=None) for name in names]
    before = list(signature.parameters.values())
    last = [each for each in before if each.kind is inspect.Parameter.VAR_KEYWORD]
    first = before[: len(before) - len(last)]
    return signature.replace(parameters=[*first, *more, *last])
