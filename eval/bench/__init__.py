"""How fast sparse attention is beside dense attention, after a correctness gate."""
