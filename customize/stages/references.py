"""The stage that draws with reference images: ``reference_images=``, ``reference_scale=``.

Models that read references by themselves (:mod:`customize.references.native`) get them as their own
argument, and nothing else of the call changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from customize.errors import ConfigError, PipelineError
from customize.pipeline.stage import CallArguments, CallContext, Stage
from customize.references.images import ARGUMENT
from customize.references.native import (
    SCALE_ARGUMENT,
    all_native_references,
    find_native_references,
    native_arguments,
    with_prompt_first,
)


@contextmanager
def _run(
    context: CallContext,
    call: CallArguments,
    reference_images: Any = None,
    reference_scale: Any = None,
) -> Iterator[CallArguments]:
    if reference_images is None:
        if reference_scale is not None:
            raise ConfigError(
                f"{SCALE_ARGUMENT}= was given without {ARGUMENT}=",
                where=SCALE_ARGUMENT,
                fix=f"give {ARGUMENT}= too, or leave it out",
            )
        yield call
        return
    native = find_native_references(context.pipe, context.parameters)
    if native is not None:
        yield call | native_arguments(native, call, reference_images, reference_scale)
        return
    if ARGUMENT in context.parameters and reference_scale is None:
        yield {**call, ARGUMENT: reference_images}  # the argument of a pipeline of another origin
        return
    raise PipelineError(
        f"{type(context.pipe).__name__} takes no reference images by itself",
        where=ARGUMENT,
        fix="use a pipeline that does: " + ", ".join(_names_of_pipelines()),
    )


def _prepare(context: CallContext, call: CallArguments) -> CallArguments:
    native = find_native_references(context.pipe, context.parameters)
    return call if native is None else with_prompt_first(native, call)


#: Adds ``reference_images=`` and ``reference_scale=`` to the arguments of pipelines.
STAGE = Stage(
    "references",
    _run,
    arguments=("reference_images", "reference_scale"),
    prepare=_prepare,
    any_family=True,
)


def _names_of_pipelines() -> list[str]:
    return [
        native.pipelines[0] if native.pipelines else f"{native.model} (modular)"
        for native in all_native_references()
    ]
