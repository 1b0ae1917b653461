"""Speed, measured side by side with what others use: what `jobs/benchmark.py` runs."""
