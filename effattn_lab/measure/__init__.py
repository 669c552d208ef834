"""Instruments: time, bytes, rooflines, and kernels compiled for GPUs that are not there."""
