"""The protocol of a stage: one transformation of the calls of a pipeline, in one file.

A stage takes the arguments of a call and returns the arguments of the call that is made in its
place. It depends on no pipeline class, since standard and modular pipelines alike take arguments by
name. A new stage is a file in :mod:`customize.stages` that defines ``STAGE``, and one line in the
table there. What ``load_custom`` keeps for all calls is a subclass of
:class:`~customize.pipeline.state.StageSetting` in the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customize.families import Family
    from customize.pipeline.state import AttachedState, StageSetting

#: Argument name -> value of one call of a pipeline.
CallArguments = dict[str, Any]


@dataclass(frozen=True)
class CallContext:
    """The pipeline that is called.

    Attributes:
        pipe: The pipeline.
        state: What is attached to its models.
        parameters: Parameter name -> default value of the pipeline's ``__call__``, and of those
            that it passes its keyword arguments on to.
        results: Attribute name -> value, which the output object of the call gets. Stages add to
            it; outputs that are tuples or plain lists stay as they are.
        requested: Argument name -> value of all stages' arguments in the call.
        shared: Type -> what a stage leaves for the stages after it.
    """

    pipe: Any
    state: AttachedState
    parameters: Mapping[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    requested: Mapping[str, Any] = field(default_factory=dict)
    shared: dict[type, Any] = field(default_factory=dict)

    @cached_property
    def family(self) -> Family:
        """Model family of the pipeline's components.

        Raises:
            PipelineError: The family is unknown.
        """
        from customize.pipeline.sources import get_family

        return get_family(self.pipe)


def _acts_on_no_call(state: AttachedState, arguments: CallArguments) -> bool:
    return False


def _as_given(context: CallContext, arguments: CallArguments) -> CallArguments:
    return arguments


@dataclass(frozen=True)
class Stage:
    """One transformation of the calls of a pipeline.

    Attributes:
        name: Key of its line in ``pipe.custom.reports``.
        run: ``run(context, arguments, **stage_arguments)`` returns a context manager that yields
            the arguments of the call to make and undoes everything else on exit. It must not
            change the dict that it receives. A stage argument that the call omits is None.
        arguments: Keyword arguments that the stage adds to every pipeline's call.
        setting: Type that ``load_custom`` accepts for this stage; None for no setting.
        acts: ``acts(state, arguments)`` is whether the stage runs on a call with these arguments
            that omits all of its own.
        exclusive: Whether no other call may use the models while the stage acts.
        prepare: ``prepare(context, arguments)`` returns the call's arguments as all stages are to
            see them. It runs before the first stage, in calls with an argument of this stage.
        any_family: Whether the stage also runs on pipelines of unknown families. It then must not
            read :attr:`CallContext.family` of those.
        repeats: Whether the stage acts again, even if the call omits its arguments, when a pipeline
            passes a call on to another pipeline of the same models.
    """

    name: str
    run: Callable[..., AbstractContextManager[CallArguments]]
    arguments: tuple[str, ...] = ()
    setting: type[StageSetting] | None = None
    acts: Callable[[AttachedState, CallArguments], bool] = _acts_on_no_call
    exclusive: bool = True
    prepare: Callable[[CallContext, CallArguments], CallArguments] = _as_given
    any_family: bool = False
    repeats: bool = True

    def is_requested(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether a call contains one of the stage's arguments."""
        return any(name in arguments for name in self.arguments)
