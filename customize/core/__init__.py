"""The mathematics of the pack, in plain torch: one file a subject, nothing of any model family."""
