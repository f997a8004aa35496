"""Pre-training under DeepSpeed: everything that has time and machines in it."""
