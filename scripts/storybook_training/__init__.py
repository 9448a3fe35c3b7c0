"""Training of the bundled base model and its judges from scratch; see train_storybook.py."""
