"""Exercises of the part on linear sequence modelling."""
