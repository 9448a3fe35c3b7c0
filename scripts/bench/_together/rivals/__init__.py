"""Other methods, written from their papers; each is one file with one function::

    draw(pipe, things, prompts, numbers, size) -> images (batch, 3, *size) in [-1, 1]

with the concepts attached to the pipeline, by a sum unless a row says otherwise; see
:class:`_together.cast.Scene` for the arguments.
"""
