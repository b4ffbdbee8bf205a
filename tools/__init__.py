"""Programs that run from a checkout: benchmarks, simulations, judges, chaos, tidy."""
