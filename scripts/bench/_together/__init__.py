"""The parts of ``together.py``: concepts, scores, rows and the rivals, one file each."""
