"""Every picture of the book and the labs; each module holds functions that return a Matplotlib figure.

``style`` sets the common look. Modules are imported by name (``from effattn_lab.figures import flash``),
so that importing the package costs nothing.
"""
