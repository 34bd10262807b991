"""The metrics as a module of `evaluate`, which loads it by the path of this folder."""
