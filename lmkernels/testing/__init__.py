"""What tests and benchmarks share: the list of shapes (`cases`) and the rule for errors (`numerics`)."""
