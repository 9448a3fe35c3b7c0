"""Calls of models that torch.compile has compiled, without their compiled code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from customize.families.pipeline_components import uncompiled


@contextmanager
def call_uncompiled(models: Iterable[Any]) -> Iterator[None]:
    """Run the models' own code inside the context, and the compiled code again after it.

    Compiled code runs no hooks of layers that were added since, without an error. It stays cached,
    so that later calls need not compile again. No other thread may call the models meanwhile.

    Args:
        models: Modules, compiled as wrappers, in place, in some of their blocks, or not.
    """
    with ExitStack() as stack:
        for model in models:
            plain = uncompiled(model)
            if plain is not model:
                stack.callback(setattr, model, "forward", model.forward)
                model.forward = plain.__call__
            for module in plain.modules():
                compiled = getattr(module, "_compiled_call_impl", None)
                if compiled is not None:
                    stack.callback(setattr, module, "_compiled_call_impl", compiled)
                    module._compiled_call_impl = None
        yield
