"""One learned concept: its files, its tokens, its slice of the basis; merging many of them."""
