"""The harness: what runs, where, in which order, and what is kept."""
