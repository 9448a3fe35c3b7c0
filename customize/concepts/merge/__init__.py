"""Merging concepts into one adapter: validation, weights, records, and writing the merge."""
