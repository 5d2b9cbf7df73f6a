"""What all commands share: flags, errors, signals, memory."""
