"""Real models to run mechanisms in."""
