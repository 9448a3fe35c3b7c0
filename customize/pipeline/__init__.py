"""Attaching concepts to the models of a pipeline, and the calls of pipelines."""
