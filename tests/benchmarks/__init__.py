"""What regularization costs: `python -m tests.benchmarks`."""
