"""The step that attaches concepts, for ``ModularPipelineBlocks.from_pretrained``."""

from customize.api.modular_step import ConceptsStep

__all__ = ["ConceptsStep"]
