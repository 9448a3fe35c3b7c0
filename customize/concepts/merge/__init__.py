"""Merging concepts into one adapter."""
