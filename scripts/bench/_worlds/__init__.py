"""What benchmarks need of the storybook and of the stickers."""
