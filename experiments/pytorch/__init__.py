"""The networks and the data pipeline in plain PyTorch, to compare with."""
