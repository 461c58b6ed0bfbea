"""Measure one GPU in two halves of at most 300 s: `python -m tools.bench.gpu --part 1`, then `--part 2`."""
