"""Learning one concept from a few pictures: settings, data, caches, the loop, checkpoints."""
