"""Attention itself, and the arithmetic that predicts what it costs."""
