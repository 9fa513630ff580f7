"""What a trained model has learned, looked at after the fact: ``python -m benchmark.analyze``."""
