"""What a training step and the data loader cost on the machine at hand; see README.md."""
