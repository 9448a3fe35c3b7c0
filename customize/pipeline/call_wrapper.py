"""The wrapper around every pipeline class's ``__call__``, which runs the stages.

Each class is wrapped once (:mod:`customize.api.patch_diffusers`). The state of its models decides
which stages a call runs through, so any pipeline of these models draws with the attached concepts.

Importing this module is cheap; what needs torch is imported by the first customized call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from customize.pipeline.call_lock import LockRequest, acquire
from customize.pipeline.call_scope import RUNNING, RunningCall, isolate_callback
from customize.pipeline.keyword_arguments import check_keywords
from customize.pipeline.model_locks import request_for_call
from customize.pipeline.state import AttachedState, get_state

if TYPE_CHECKING:
    from customize.pipeline.stage import CallArguments, Stage

_VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD


def wrap_call(
    call: Any,
    stage_arguments: Sequence[str],
    load_stages: Callable[[], Sequence[Stage]],
    shared_arguments: Sequence[str] = (),
) -> Any:
    """Return a pipeline's ``__call__`` with the arguments of the stages, which it runs in order.

    Args:
        call: Function of a pipeline class.
        stage_arguments: The stages' call arguments.
        load_stages: Returns the stages; called by the first call that may need one.
        shared_arguments: Those of them that go to their stage even if the call has an argument of
            that name itself. Of all others, the call's own arguments stay its own.
    """
    signature = inspect.signature(call)
    parameters = signature.parameters.values()
    added = [name for name in stage_arguments if name not in signature.parameters]
    read = {*added, *shared_arguments}
    has_positional = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)

    @functools.wraps(call)
    def run_stages(self: Any, *args: Any, **kwargs: Any) -> Any:
        if has_positional and _is_wrapped_below(type(self), call):
            return call(self, *args, **kwargs)  # the inherited call names the arguments
        outer = RUNNING.get()
        is_super = outer is not None and outer.pipe is self and outer.call is not call
        requested = {name: kwargs.pop(name) for name in read & kwargs.keys()}
        requested = {name: value for name, value in requested.items() if value is not None}
        check_keywords(self, call, signature, kwargs, stage_arguments)
        if is_super and not requested:  # the class below ran the stages
            return call(self, *args, **kwargs)
        # A wrong argument raises the pipeline's own TypeError here, before anything is done. A
        # missing one may be what a stage converts its own argument to.
        bind = signature.bind_partial if requested else signature.bind
        bound = None if has_positional else _name_arguments(signature, bind(self, *args, **kwargs))

        def acting(state: AttachedState | None) -> list[Stage]:
            return [
                stage
                for stage in (load_stages() if state is not None or requested else ())
                if stage.is_requested(requested)
                or (state is not None and stage.acts(state, kwargs if bound is None else bound))
            ]

        def request() -> LockRequest:
            state = get_state(self)
            return request_for_call(
                self,
                kwargs if bound is None else bound,
                customized=state is not None or bool(requested),
                exclusive=any(stage.exclusive for stage in acting(state)),
            )

        RUNNING.set(RunningCall(self, call))
        try:
            with acquire(request):
                state = get_state(self)
                if state is None and not requested:
                    return call(self, *args, **kwargs)
                stages = acting(None if is_super else state)
                if outer is not None and outer.state is state:
                    # The call was passed on to this pipeline.
                    stages = [s for s in stages if s.repeats or s.is_requested(requested)]
                elif state is not None and not is_super:
                    state.call_reports.clear()
                RUNNING.set(RunningCall(self, call, state))
                positional = args if bound is None else ()
                arguments = kwargs if bound is None else bound
                if not stages:
                    return call(self, *positional, **arguments)
                return _run_through(
                    stages, call, self, positional, arguments, requested, state or AttachedState()
                )
        finally:
            RUNNING.set(outer)

    run_stages._customize_patched = True  # type: ignore[attr-defined]
    run_stages.__signature__ = _with_keywords(signature, added)  # type: ignore[attr-defined]
    return run_stages


def _run_through(
    stages: Sequence[Stage],
    call: Any,
    pipe: Any,
    args: Sequence[Any],
    arguments: CallArguments,
    requested: Mapping[str, Any],
    state: AttachedState,
) -> Any:
    """Run the stages around a call, and check what it returns."""
    from customize.errors import PipelineError
    from customize.pipeline.finite_outputs import check_finite_output
    from customize.pipeline.stage import CallContext

    context = CallContext(pipe, state, _parameters(pipe, call), requested=requested)
    try:
        _ = context.family
    except PipelineError:
        if any(stage.exclusive and not stage.any_family for stage in stages):
            raise
        stages = [stage for stage in stages if stage.any_family]
        if not stages:
            return call(pipe, *args, **arguments)  # concepts act through the models alone
    arguments = {
        name: isolate_callback(value) if name.startswith("callback") else value
        for name, value in arguments.items()
    }
    for stage in stages:
        if stage.is_requested(requested):
            arguments = stage.prepare(context, arguments)
    with ExitStack() as stack:
        for stage in stages:
            stage_arguments = {name: requested.get(name) for name in stage.arguments}
            arguments = stack.enter_context(stage.run(context, arguments, **stage_arguments))
        output = check_finite_output(pipe, lambda: call(pipe, *args, **arguments))
        if hasattr(output, "__dict__"):
            vars(output).update(context.results)
        return output


def _parameters(pipe: Any, call: Any) -> dict[str, Any]:
    """Return parameter -> default of a call and of the inherited ones that it may pass on to."""
    blocks = vars(pipe).get("_blocks")
    if blocks is not None:  # a modular pipeline
        return {block.name: block.default for block in blocks.inputs if block.name}
    calls = [call]
    if any(p.kind is _VAR_KEYWORD for p in inspect.signature(call).parameters.values()):
        inherited = (vars(base).get("__call__") for base in type(pipe).__mro__)
        # Without our wrapper, whose signature has the arguments of the stages too.
        calls += [
            getattr(function, "__wrapped__", function)
            if hasattr(function, "_customize_patched")
            else function
            for function in inherited
            if inspect.isfunction(function)
        ]
    return {
        name: parameter.default
        for function in reversed(calls)
        for name, parameter in inspect.signature(function).parameters.items()
    }


def _is_wrapped_below(cls: type, call: Any) -> bool:
    """Return whether a class below the one that defines this ``__call__`` has a wrapped one too."""
    wrapped = [
        function
        for base in cls.__mro__
        if hasattr(function := vars(base).get("__call__"), "_customize_patched")
    ]
    return any(getattr(function, "__wrapped__", None) is call for function in wrapped[:-1])


def _name_arguments(signature: inspect.Signature, bound: inspect.BoundArguments) -> CallArguments:
    """Return the arguments of a call by name, without the pipeline."""
    arguments: CallArguments = {}
    for name, value in list(bound.arguments.items())[1:]:
        is_var_keyword = signature.parameters[name].kind is _VAR_KEYWORD
        arguments.update(value if is_var_keyword else {name: value})
    return arguments


def _with_keywords(signature: inspect.Signature, names: Sequence[str]) -> inspect.Signature:
    """Return a signature with more keyword arguments, which editors then show."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=None) for name in names]
    parameters = list(signature.parameters.values())
    last = [parameter for parameter in parameters if parameter.kind is _VAR_KEYWORD]
    first = parameters[: len(parameters) - len(last)]
    return signature.replace(parameters=[*first, *added, *last])
