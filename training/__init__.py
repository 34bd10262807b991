"""Learning and judging: data, collation, training, scores."""
