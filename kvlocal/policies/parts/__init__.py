"""What policies are made of: views of the cache, scores, allocations, checked parameters."""
