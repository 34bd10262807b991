"""From a media file to tensors, and from tensors to a caption."""
