"""Importers and exporters: one module per format, and what they share."""
