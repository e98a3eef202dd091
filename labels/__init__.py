"""Labelled audio, for training and evaluation: lists, batches, tasks with their heads and losses, scores."""
