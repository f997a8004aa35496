"""The data2vec 2.0 networks and objective: tensors only, no files, ranks, clock or DeepSpeed."""
