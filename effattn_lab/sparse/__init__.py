"""Sparse attention: exact softmax over fewer keys. Who chooses them, and what does the choice cost?"""
