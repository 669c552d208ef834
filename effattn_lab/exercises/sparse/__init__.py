"""Exercises of the labs on sparse attention."""
