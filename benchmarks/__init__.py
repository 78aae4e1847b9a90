"""Speed of this library beside what a user would run instead: `python -m benchmarks --help`."""
