"""Where concepts meet diffusers: ``load_custom``, ``unload_custom`` and what they do to a pipeline.

Import from the modules; this one stays empty so that ``import customize`` stays light.
"""
