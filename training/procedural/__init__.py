"""Procedural clips: scenes whose sources are known, drawn and synthesised, with captions."""
