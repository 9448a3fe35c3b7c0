"""Parts of scripts/train_storybook_rewriter.py, in the order in which they run."""
