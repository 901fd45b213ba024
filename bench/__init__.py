"""Timing first tokens, and the arithmetic to hold the times against (imports as ``kvp_mlx.bench``)."""
