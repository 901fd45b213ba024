"""Ordinary mlx-lm models: finding and loading them, the table of architectures, cutting, listening, cache entries."""
