"""Scores: the storybook's exact rates, and CLIP and DINO similarities for real models."""
