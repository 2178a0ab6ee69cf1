"""Speed against peers and ceilings measured in the same run: `make bench`, or `python -m benchmarks`."""
