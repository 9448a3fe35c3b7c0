"""Reference images: images that a call shows the model beside its prompt.

Models that read them by themselves (:mod:`customize.references.native`) get them as their own
argument. For others, groups of images are read by a multimodal LLM (EasyRef, arXiv 2412.09618).
"""
