"""Importers, one for each source, and what they share."""
