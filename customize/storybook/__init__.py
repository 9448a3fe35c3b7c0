"""The storybook: a drawn miniature world, the base model and the judges that ship with the pack."""
