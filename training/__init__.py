"""A run of a distillation: its settings, data, checkpoints, callbacks, speed and trainer."""
