"""Frozen encoders -> labels: features, splits, heads, metrics."""
