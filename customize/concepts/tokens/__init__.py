"""The tokens of concepts: their rows of embedding tables, and prompts that contain them."""
