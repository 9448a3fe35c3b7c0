"""Parts of scripts/train_storybook_clip.py."""
