"""Data: from media files and captions to batches."""
