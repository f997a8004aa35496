"""What a pre-trained encoder is worth: frozen features, probes on them, and a picture of a run."""
