"""Training of language models that rewrite prompts, by trl: supervised, and from preferences."""
