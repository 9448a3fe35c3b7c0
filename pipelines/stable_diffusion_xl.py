"""Stable Diffusion XL with ``load_custom``, for ``custom_pipeline=``."""

import diffusers

# Which gives all of diffusers' pipelines load_custom, unload_custom and custom.
import customize


class StableDiffusionXLPipeline(diffusers.StableDiffusionXLPipeline):
    """diffusers' own, by its own name: ``custom_pipeline=`` wants a class from this file."""
