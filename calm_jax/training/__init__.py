"""One loop for every stage: step, optimizer, checkpoints, metrics."""
