"""Data that every Python installation has or that is made here."""
