"""The step that reads reference images, for ``ModularPipelineBlocks.from_pretrained``."""

from customize.api.references_step import ReferencesStep

__all__ = ["ReferencesStep"]
