"""A compiled program -> its FLOPs, bytes, collectives and memory, and their time on a TPU."""
