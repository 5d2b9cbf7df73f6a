"""What `python -m experiments.export` is made of."""
