"""Importers: one module per source of checkpoints."""
