"""Exercises of the part on sparse sequence modelling."""
