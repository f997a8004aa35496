"""Labelled data, one file a modality: how it is read, and what of an encoder probes see."""
