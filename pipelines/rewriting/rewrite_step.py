"""The step that rewrites prompts, for ``ModularPipelineBlocks.from_pretrained``."""

from customize.api.rewrite_step import RewriteStep

__all__ = ["RewriteStep"]
