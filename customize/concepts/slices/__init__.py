"""Slices of the shared orthogonal matrix: allocation, reservation, overlap."""
