"""Stable Diffusion 1.x and 2.x with ``load_custom``, for ``custom_pipeline=``."""

import diffusers

# Which gives all of diffusers' pipelines load_custom, unload_custom and custom.
import customize


class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):
    """diffusers' own, by its own name: ``custom_pipeline=`` wants a class from this file."""
