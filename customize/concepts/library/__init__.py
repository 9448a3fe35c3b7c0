"""Libraries: folders of concepts, which prompts select by their triggers."""
