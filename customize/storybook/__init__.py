"""The storybook: a test world of eight classes (drawn), whose images can be scored exactly."""
