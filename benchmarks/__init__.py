"""What EVACap costs: time, memory and the distance to the machine's limit. Run from the repository's root."""
