"""The native library as Python and numpy: models, contexts, the paged cache, samplers. It knows no policy."""
