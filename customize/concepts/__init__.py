"""One learned concept: its files, its tokens, its slice of the matrix; merging many of them."""
