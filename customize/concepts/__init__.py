"""Concepts and LoRAs: their types, files, formats, slices, libraries and merges.

Imports go one way, from the last of these to the first (``make lint`` checks it)::

    tokens, concept_info    prompts and token embeddings; the facts in concept.json
    types                   Concept and Lora, without I/O
    adapter, base_weight    updates on a live model; weights of quantized layers
    io                      reading and writing concepts: folders, single files, the hub
    input_statistics        recorded layer inputs
    formats, slices         LoRA files of other programs; which columns belong to whom
    merge, library          merging concepts; folders of concepts
"""
