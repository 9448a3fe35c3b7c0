"""The public functions, and what ``import customize`` adds to diffusers."""
