"""Prompt rewriting by language models: generation, checks, repair, and models that are trained.

The method is Prompt-A-Video (arXiv 2412.15156); the stage is :mod:`customize.stages.rewrite`.
"""
