"""The demo: train three bundled concepts, merge them, generate images and score them."""
