"""Linear sequence mixing: a state of fixed size in the place of a cache that grows."""
