"""Evaluation: captions of clips under matched and swapped videos, their scores, and a report."""
