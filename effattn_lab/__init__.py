"""Efficient Attention Lab."""
