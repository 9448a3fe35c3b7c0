"""The step that attaches concepts, for ``ModularPipelineBlocks.from_pretrained``."""

from customize.hosts.modular import ConceptsStep

__all__ = ["ConceptsStep"]
