"""What the documentation shows of the demo, made anew with one command: ``python -m benchmark.evidence``."""
