"""How networks train: step, devices, augmentation, optimiser, checkpoints, predictions."""
