"""MAE, wav2vec 2.0 and RoBERTa's masked language modelling, of the layers of `transformers` (docs/method.md 5)."""
