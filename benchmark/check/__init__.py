"""The regression gate: ``python -m benchmark.check``. Imports nothing heavy; the statistics are leaderboard.gate's."""
