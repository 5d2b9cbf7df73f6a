"""What `python -m experiments.train` is made of: a run from its settings to its records."""
