"""Metrics: rates of the storybook, CLIP, DINO and BLIP for real models, and the Pareto front."""
