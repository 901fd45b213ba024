"""Measuring what a sooner first token costs."""
