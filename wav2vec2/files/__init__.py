"""Reads and writes model files, folders and checkpoints, and treats what strangers wrote with care."""
