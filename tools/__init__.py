"""Programs that run from a checkout: benchmarks, checkers, chaos, tidy."""
