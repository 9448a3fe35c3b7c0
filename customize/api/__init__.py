"""The public functions, and the patches that ``import customize`` applies to diffusers."""
