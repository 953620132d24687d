"""From files to batches: sources, decoding, views, masking, loader."""
