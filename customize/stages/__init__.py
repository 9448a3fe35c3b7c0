"""The stages that calls of a customized pipeline run through.

A stage is a file of this package that defines ``STAGE``, a :class:`customize.pipeline.stage.Stage`,
and one line of :data:`ORDER`. Nothing else names a stage.
"""

from __future__ import annotations

import functools
from importlib import import_module

from customize.pipeline.stage import Stage

#: (module, call arguments) of each stage, in the order in which the stages run. The arguments are
#: repeated here because ``import customize`` adds them to diffusers' signatures without importing
#: the stages, and with them torch.
#:
#: Library routing is first, since the others need the prompt's concepts attached. Prompts are
#: rewritten with the concepts known, and checked as they are drawn. References and regions encode
#: prompts of their own, which ``avoid=`` cleans too, and references of regions need to be attached
#: outside of these. So does ``together=``, which is combined with neither.
ORDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("library_routing", ()),
    ("rewrite", ("rewrite", "keep")),
    ("check_prompts", ()),
    ("avoid", ("avoid",)),
    ("references", ("reference_images", "reference_scale")),
    ("regions", ("regions",)),
    ("together", ("together", "return_masks")),
)

#: All keyword arguments that stages add to the calls of pipelines.
CALL_ARGUMENTS = tuple(sorted(name for _, arguments in ORDER for name in arguments))

#: Those that go to their stage even if a pipeline has an argument of that name itself.
SHARED_ARGUMENTS = ("reference_images",)


@functools.cache
def load_stages() -> tuple[Stage, ...]:
    """Import the stages and return them in the order in which they run."""
    return tuple(import_module(f"{__name__}.{module}").STAGE for module, _ in ORDER)
