"""Measures what a model costs and what it still knows (evaluate.py)."""
