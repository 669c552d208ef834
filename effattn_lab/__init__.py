"""Efficient Attention Lab: the companion package of the book.

Mechanisms live in ``effattn_lab.<part>.<slug>``; their Triton kernels in ``effattn_kernels.<slug>``,
which this package never imports at module level.
"""

__version__ = "0.1.0"
