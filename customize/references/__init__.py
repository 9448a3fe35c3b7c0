"""Reference images: groups of pictures read by a multimodal LLM (EasyRef, arXiv 2412.09618)."""
