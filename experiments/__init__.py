"""One command a module: `python -m experiments.NAME --help`."""
