"""Training images: folders, captions, decoding, buckets, batches."""
