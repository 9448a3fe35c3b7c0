"""DECOR (arXiv 2412.09169): unwanted content projected out of prompts, concepts and references."""
