"""What users import in their tests: local and simulated clusters, workloads, a pytest plugin."""
