"""``make bench``, and the timing that evaluate.py shares with it."""
