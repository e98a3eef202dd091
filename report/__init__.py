"""Shows a run on one page, read from its files: python -m report EXP."""
