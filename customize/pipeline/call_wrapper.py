"""What calls of a pipeline go through: stages, and the claims on what they use.

A *stage* takes a call and gives a call. It knows no pipeline class: a call is a dict by the names
of the arguments, standard pipelines' and modular ones' alike. Every pipeline class's ``__call__``
is wrapped once (:mod:`customize.api.patch_diffusers`), and what a call goes through is decided
by what its models carry; so it makes no difference through which pipeline concepts were loaded.

Nothing heavy is imported here before a call has need of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from customize.pipeline.call_lock import LockRequest, acquire
from customize.pipeline.keyword_arguments import check_keywords

if TYPE_CHECKING:
    from customize.families import Family
    from customize.pipeline.state import AttachedState

CallArguments = dict[str, Any]

#: What stages add to the arguments of every pipeline.
ARGUMENTS = ("avoid", "regions")

#: Where a denoiser carries its :class:`customize.pipeline.state.AttachedState`.
STATE_KEY = "_customize"


@dataclass(frozen=True)
class CallContext:
    """The pipeline of a call, the family of its models, and what is attached to these.

    Attributes:
        parameters: argument that the call takes -> its default; also those of the classes below,
            to which a class of a user's may hand its keywords on.
    """

    pipe: Any
    family: Family
    state: AttachedState
    parameters: Mapping[str, Any]


def _nothing(state: AttachedState) -> bool:
    return False


@dataclass(frozen=True)
class Stage:
    """One thing that is done to calls.

    Attributes:
        arguments: names of the keyword arguments that it adds to the pipeline's; None where a call
            leaves one out.
        run: ``run(context, call, **arguments)`` is a context manager that gives the call that is to
            be made in its place, and undoes after it whatever else it did. It runs where one of
            its arguments is given or where it acts on all calls, and may not change the dict that
            it is given.
        setting: type of what ``load_custom`` takes for all calls; ``state.settings`` has it.
        acts: ``acts(state)`` is whether it acts on calls that give none of its arguments.
        exclusive: whether no other call may use the models while it acts.
    """

    arguments: tuple[str, ...]
    run: Callable[..., AbstractContextManager[CallArguments]]
    setting: type | None = None
    acts: Callable[[AttachedState], bool] = _nothing
    exclusive: bool = True


@dataclass(frozen=True)
class _Running:
    """The innermost call of a pipeline that is under way, and what acts on it."""

    pipe: Any
    call: Any
    state: AttachedState | None = None


_RUNNING: ContextVar[_Running | None] = ContextVar("customize_running", default=None)

# Other in each run of a callback: what that calls is no part of the call it is given to.
_SCOPE: ContextVar[object] = ContextVar("customize_scope", default=None)


def wrap_call(call: Any) -> Any:
    """A pipeline's ``__call__`` with the arguments of stages, which run in their order."""
    signature = inspect.signature(call)
    parameters = signature.parameters.values()
    own = [name for name in ARGUMENTS if name not in signature.parameters]
    opaque = any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)

    @functools.wraps(call)
    def staged_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if opaque and _is_wrapped_again(type(self), call):
            return call(self, *args, **kwargs)  # whose `super()` knows the arguments' names
        outer = _RUNNING.get()
        is_super = outer is not None and outer.pipe is self and outer.call is not call
        given = {name: kwargs.pop(name) for name in own if name in kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        check_keywords(self, call, signature, kwargs, ARGUMENTS)
        if is_super and not given:  # the stages were gone through by the class below
            return call(self, *args, **kwargs)
        # A wrong argument is the pipeline's own TypeError, before anything is done.
        asked = None if opaque else _by_name(signature.bind(self, *args, **kwargs))
        _RUNNING.set(_Running(self, call))
        try:
            with acquire(lambda: _uses(self, asked or kwargs, given)):
                state = find_state(self)
                if state is None and not given:
                    return call(self, *args, **kwargs)
                stages = _acting(None if is_super else state, given)
                if outer is not None and outer.state is state:  # it was handed on to this pipeline
                    stages = [s for s in stages if s.setting is None or _asks(s, given)]
                _RUNNING.set(_Running(self, call, state))
                if asked is not None:
                    args, kwargs = (), dict(list(asked.items())[1:])  # without self
                return _through_stages(call, self, args, kwargs, given, state, stages)
        finally:
            _RUNNING.set(outer)

    staged_call._customize_wrapped = True  # type: ignore[attr-defined]
    staged_call.__signature__ = _with(signature, own)  # type: ignore[attr-defined]
    return staged_call


def iterate_components(pipe: Any) -> Iterator[Any]:
    """The objects that a pipeline has as attributes, its components among them; modules without
    torch.compile's wrapper."""
    for part in vars(pipe).values():
        yield getattr(part, "_orig_mod", part)


def get_models(pipe: Any) -> list[Any]:
    """The modules that a pipeline has as components."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [part for part in iterate_components(pipe) if isinstance(part, torch.nn.Module)]


def find_state(pipe: Any) -> AttachedState | None:
    """What is attached to the denoiser of a pipeline; None where nothing is."""
    for model in get_models(pipe):
        state: AttachedState | None = vars(model).get(STATE_KEY)
        if state is not None:
            return state
    return None


def capture_call_scope() -> Callable[[], bool]:
    """A function that tells whether what is computed belongs to the call that is under way now,
    and not to one that a callback of it makes on the same models."""
    scope = _SCOPE.get()
    return lambda: _SCOPE.get() is scope


def lock_models(pipe: Any) -> AbstractContextManager[None]:
    """Within it, no other call uses the models of a pipeline."""

    def uses() -> LockRequest:
        state = find_state(pipe)
        return LockRequest(
            exclusive=[*get_models(pipe), *(state.components.values() if state else ())]
        )

    return acquire(uses if hasattr(pipe, "__dict__") else LockRequest)


def lock_tokenizers(pipe: Any) -> AbstractContextManager[None]:
    """Within it, no other call uses the stock tokenizers of a pipeline."""
    found = [
        part for part in iterate_components(pipe) if _is_tokenizer(part) and not _expands(part)
    ]
    return acquire(lambda: LockRequest(exclusive=found))


def _uses(pipe: Any, call: Mapping[str, Any], given: Mapping[str, Any]) -> LockRequest:
    """What a call uses, and whether others may use it at the same time."""
    models = get_models(pipe)
    state = find_state(pipe)
    if state is None and not given:
        return LockRequest(shared=models)
    # Schedulers and guiders go on from step to step, and a pipeline notes things on itself.
    stateful = [pipe, *(part for part in iterate_components(pipe) if hasattr(part, "from_config"))]
    exclusive = [part for part in stateful if part not in models]
    # Tokenizers are set to a length before each text; those that expand triggers see to it.
    exclusive += [p for p in iterate_components(pipe) if _is_tokenizer(p) and not _expands(p)]
    alone = any(stage.exclusive for stage in _acting(state, given))
    alone = alone or _scales_adapters(call) or _changes_models(pipe)
    if alone or any(map(_is_hooked, models)):
        return LockRequest(exclusive=[*models, *exclusive])
    return LockRequest(shared=models, exclusive=exclusive)


def _is_tokenizer(part: Any) -> bool:
    return hasattr(part, "get_added_vocab")


def _expands(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "_customize_stock")


def _acting(state: AttachedState | None, given: Mapping[str, Any]) -> list[Stage]:
    """The stages that do something to a call."""
    from customize.stages import STAGES

    return [stage for stage in STAGES if _asks(stage, given) or (state and stage.acts(state))]


def _asks(stage: Stage, given: Mapping[str, Any]) -> bool:
    return any(name in given for name in stage.arguments)


def _scales_adapters(call: Mapping[str, Any]) -> bool:
    """Whether diffusers changes the adapters' scales in the models during the call."""
    scales = [
        value.get("scale", 1.0)
        for name, value in call.items()
        if name.endswith("attention_kwargs") and isinstance(value, Mapping)
    ]
    return any(scale != 1.0 for scale in scales)


def _changes_models(pipe: Any) -> bool:
    """Whether a step of a modular pipeline attaches concepts."""
    todo = [vars(pipe).get("_blocks")]  # of which `pipe.blocks` is a copy
    while todo:
        block = todo.pop()
        if getattr(block, "changes_models", False):
            return True
        todo += dict(getattr(block, "sub_blocks", None) or {}).values()
    return False


def _is_hooked(model: Any) -> bool:
    """Whether weights come and go, or answers are kept, by hooks that know one call at a time."""
    todo = [model]
    while todo:  # `modules()` also makes names and a set, which takes several times as long
        module = vars(todo.pop())
        if "_hf_hook" in module or getattr(module.get("_diffusers_hook"), "hooks", None):
            return True
        todo += [child for child in module["_modules"].values() if child is not None]
    return False


def _through_stages(
    call: Any,
    pipe: Any,
    args: Sequence[Any],
    asked: CallArguments,
    given: Mapping[str, Any],
    state: AttachedState | None,
    stages: Sequence[Stage],
) -> Any:
    if not stages:
        return call(pipe, *args, **asked)
    from customize.errors import PipelineError
    from customize.pipeline.finite_outputs import check_finite_output
    from customize.pipeline.sources import get_family
    from customize.pipeline.state import AttachedState

    try:
        family = get_family(pipe)
    except PipelineError:
        if any(stage.exclusive for stage in stages):
            raise
        return call(pipe, *args, **asked)  # concepts act by what is in the models
    context = CallContext(pipe, family, state or AttachedState(), _parameters(pipe, call))
    asked = {
        name: _apart(value) if name.startswith("callback") else value
        for name, value in asked.items()
    }
    with ExitStack() as stack:
        for stage in stages:
            mine = {name: given.get(name) for name in stage.arguments}
            asked = stack.enter_context(stage.run(context, asked, **mine))
        return check_finite_output(pipe, functools.partial(call, pipe, *args, **asked))


def _apart(callback: Any) -> Any:
    """A callback whose own calls of pipelines are no part of the call that it is given to."""
    if not callable(callback):
        return callback
    if hasattr(callback, "tensor_inputs"):  # diffusers' PipelineCallback, or several of them
        made = copy.copy(callback)
        if hasattr(made, "callbacks"):
            made.callbacks = [_apart(each) for each in callback.callbacks]
        else:
            made.callback_fn = _apart(callback.callback_fn)
        return made

    @functools.wraps(callback)
    def apart(*args: Any, **kwargs: Any) -> Any:
        running, scope = _RUNNING.set(None), _SCOPE.set(object())
        try:
            return callback(*args, **kwargs)
        finally:
            _RUNNING.reset(running)
            _SCOPE.reset(scope)

    return apart


def _parameters(pipe: Any, call: Any) -> dict[str, Any]:
    blocks = vars(pipe).get("_blocks")
    if blocks is not None:
        return {each.name: each.default for each in blocks.inputs if each.name}
    own = inspect.signature(call).parameters
    calls = [call]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in own.values()):
        inherited = (vars(base).get("__call__") for base in type(pipe).__mro__)
        calls += [each for each in inherited if inspect.isfunction(each)]
    return {
        name: each.default
        for function in reversed(calls)
        for name, each in inspect.signature(function).parameters.items()
    }


def _is_wrapped_again(cls: type, call: Any) -> bool:
    """Whether a class below the one that this ``__call__`` is of has a wrapped one too."""
    wrapped = [
        function
        for base in cls.__mro__
        if hasattr(function := vars(base).get("__call__"), "_customize_wrapped")
    ]
    return any(getattr(function, "__wrapped__", None) is call for function in wrapped[:-1])


def _by_name(bound: inspect.BoundArguments) -> CallArguments:
    found: CallArguments = {}
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
