"""Per-row symmetric rounding, its straight-through twin for training, and the byte coding of its values."""
