"""What acts do with any stage: load it, train it, evaluate it, export it."""
