"""Scores: the storybook's exact rates, those of CLIP, DINO and BLIP for real models, and which of
many settings no other beats."""
