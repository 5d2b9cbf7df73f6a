"""What `python -m experiments.scaling` is made of."""
