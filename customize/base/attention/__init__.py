"""Attention backends: selection, checks against float64, application."""
