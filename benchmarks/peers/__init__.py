"""PyTorch's models, one file per stage, named after it: `Model(job)` maps tokens to the loss."""
