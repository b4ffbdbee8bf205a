"""What `python -m tools.simulate` is made of: the judge, the fleet of workers, totals, the shrinker."""
