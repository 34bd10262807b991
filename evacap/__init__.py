"""EVACap."""
