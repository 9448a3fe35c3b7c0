"""Adapter files of other programs, such as LoRAs: parsing, resolving in a model, and writing.

``decoders``        the formats of updates: one file for each, one line for each in the registry
``tensor_keys``     which layer a key belongs to, and which part of its update it stores
``layer_names``     which layer of a model a name in a file means
``layer_updates``   decoding one layer by the format that matches it
``lora_file``       a whole file: parsed, resolved in a model, checked
``open_adaptation`` opening concepts and files by path or hub id
``write_kohya``     tensors and header with kohya's keys
"""
