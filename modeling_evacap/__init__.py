"""The network: configuration and model."""
