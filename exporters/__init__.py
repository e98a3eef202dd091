"""Writes models in formats that other programs load, and their cards."""
