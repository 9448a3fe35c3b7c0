"""Training of `assets/references`, the bundled miniature of EasyRef for the storybook."""
