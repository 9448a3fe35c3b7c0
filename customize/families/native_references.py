"""Declarations of pipelines that read reference images by themselves.

Each model family lists its own in ``native_references``; those of models without a family are in
:mod:`customize.references.native`, which also converts a user's images to the declared argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: "image": one PIL image. "list": a list of them. "nested": a list for each prompt. "typed": a list
#: of dataclasses of the pipeline.
ReferenceForm = Literal["image", "list", "nested", "typed"]

#: "one prompt": a call has one prompt. "shared": all prompts of a call have the same references.
#: "own": each prompt of a call may have references of its own.
ReferencePrompts = Literal["one prompt", "shared", "own"]

#: The reference whose size or aspect ratio the output has if a call omits height and width. "none":
#: the output's size is independent of the references. "no image": the output is no image.
OutputSize = Literal["first", "last", "none", "no image"]


@dataclass(frozen=True)
class NativeReferences:
    """How pipelines of one model take reference images.

    Attributes:
        model: Name of the model.
        pipelines: Class names of its standard pipelines.
        argument: The call argument that takes the references.
        blocks: ``model_name`` of the blocks of its modular pipelines.
        form: Type of the argument's value.
        limit: Maximum number of references of a prompt; None for no limit.
        prompts: How several prompts in a call share references.
        output_size: Which reference decides the size of the output.
        order: What the position of a reference means to the model.
        size_rule: What the model does to the size of each reference.
        max_pixels: Number of pixels above which the model shrinks a reference; None if it does not,
            or depends on other arguments.
        max_pixels_alone: The same where there is only one reference; None for ``max_pixels``.
        min_side: Minimum height and width of a reference in pixels.
        max_aspect: Maximum ratio of the longer to the shorter side; None for no limit.
        placeholder: What the prompt must contain for each reference, with ``{}`` for its number
            from 1; empty if nothing.
        equal_counts: Whether each prompt of a call needs the same number of references.
        scale_arguments: Call arguments that take a weight for each reference.
        cache: Whether keys and values of the references are computed once for all steps.
    """

    model: str
    pipelines: tuple[str, ...]
    argument: str = "image"
    blocks: tuple[str, ...] = ()
    form: ReferenceForm = "list"
    limit: int | None = None
    prompts: ReferencePrompts = "shared"
    output_size: OutputSize = "none"
    order: str = "image 1, image 2, ... of the prompt"
    size_rule: str = ""
    max_pixels: int | None = None
    max_pixels_alone: int | None = None
    min_side: int = 1
    max_aspect: float | None = None
    placeholder: str = ""
    equal_counts: bool = False
    scale_arguments: tuple[str, ...] = ()
    cache: str = "no"

    def matches(self, pipe: Any, parameters: Mapping[str, Any]) -> bool:
        """Whether a pipeline is one of these, or a subclass that still takes the argument.

        Args:
            pipe: A standard or modular pipeline.
            parameters: Names of the call's parameters.
        """
        if self.argument not in parameters:
            return False
        blocks = vars(pipe).get("_blocks")
        if blocks is not None:
            return getattr(blocks, "model_name", None) in self.blocks
        return any(base.__name__ in self.pipelines for base in type(pipe).__mro__)
