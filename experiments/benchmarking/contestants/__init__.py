"""The ways to compute a case, in JAX and in PyTorch, each in a process of its own."""
