"""Stickers: a world of emoji by several artists, on coloured grounds, at known places and sizes."""
