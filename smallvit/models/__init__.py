"""Create architectures, register them with timm, and load weights by name."""
