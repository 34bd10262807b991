"""The study of mismatch: `python -m evacap.training.study`."""
