"""The pages of docs/ that benchmarks write; every sentence with a number is computed from what was measured."""
