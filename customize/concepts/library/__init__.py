"""Libraries: folders of concepts that prompts name."""
