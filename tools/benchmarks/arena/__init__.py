"""What tools/arena.py consists of."""
