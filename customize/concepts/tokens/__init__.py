"""Tokens of concepts: vocabulary entries, embedding rows, and triggers in prompts."""
