"""LoRA files of other programs: read into low-rank products, and written for them.

``keys``     what a key says: which layer, and which part of its update
``names``    which of a model's layers that is
``updates``  the parts of a layer's update as a product
``lora``     a whole file, checked
``kohya``    writing kohya's keys, which ComfyUI and the web UIs read
"""
