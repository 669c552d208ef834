"""Efficient full attention: the same function, computed with less traffic."""
