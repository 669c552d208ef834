"""Exercises of the part on full attention."""
