"""Concepts as a step of diffusers' modular pipelines that are built from blocks.

::

    blocks = ModularPipeline.from_pretrained("base").blocks
    blocks.sub_blocks.insert("concepts", ConceptsStep(), 0)
    pipe = blocks.init_pipeline("base")
    pipe.load_components()
    pipe(prompt="a photo of <rex>", concepts=["concepts/rex"], output="images")[0]

The step is inserted before the one that encodes prompts. It changes no prompt: the tokenizer
replaces triggers by their tokens, whichever step calls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, PipelineState

from customize.concepts.types import Concept
from customize.core.precision import full_precision
from customize.errors import ConfigError
from customize.pipeline.attach import set_concepts
from customize.pipeline.model_locks import lock_models
from customize.pipeline.stage import CallContext
from customize.pipeline.state import AttachedState, get_state
from customize.stages.check_prompts import warn_about_triggers


class ConceptsStep(ModularPipelineBlocks):
    """Attaches the concepts that a call requests, and detaches all others.

    They stay attached after the call, so that the next call with the same concepts changes nothing.
    A call without the argument leaves the attached concepts as they are; an empty list detaches
    all.
    """

    #: So that no other call uses the models meanwhile.
    changes_models = True

    @property
    def description(self) -> str:
        """Description of the step, as diffusers prints it."""
        return (
            "Step that attaches learned concepts to the models, merged by their weighted sum. "
            "Insert it before the text encoder step."
        )

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments that the step adds to the pipeline's call."""
        return [
            InputParam(
                "concepts",
                type_hint=Sequence[str | Path | Concept],
                description="The concepts to draw with and no others: folders or .safetensors "
                "files, hub ids, or Concept objects. Left out, those that are attached.",
            ),
            InputParam(
                "concept_weights",
                type_hint=Sequence[float | Mapping[str, Any]]
                | Mapping[str, float | Mapping[str, Any]],
                description="One for each of them, or a dict from concept name to weight; 1.0 "
                "where left out. A weight is a number, or a dict by component and block.",
            ),
        ]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Attach the concepts of a call, and warn about unknown triggers in its prompts."""
        block_state: Any = self.get_block_state(state)
        concepts = block_state.concepts
        if concepts is not None:
            is_list = isinstance(concepts, Sequence) and not isinstance(concepts, str)
            with lock_models(components), full_precision(tf32=True):
                set_concepts(
                    components,
                    concepts if is_list else [concepts],
                    weights=block_state.concept_weights,
                )
            attached = get_state(components) or AttachedState()
            context = CallContext(components, attached, {})
            warn_about_triggers(context, state.values)
        elif block_state.concept_weights is not None:
            raise ConfigError(
                "weights are given without concepts",
                where="concept_weights",
                fix="name the concepts that they belong to: concepts=[...]",
            )
        return components, state
