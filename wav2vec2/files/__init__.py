"""Model files, folders and checkpoints: written, and read without trusting them."""
