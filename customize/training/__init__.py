"""Learning concepts from a few pictures: settings, data, caches, the loop, checkpoints."""
