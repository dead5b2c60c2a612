"""PyTorch's models, one file a stage, named after it: `Model(job)` maps tokens to the loss."""
