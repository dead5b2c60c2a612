"""Devices, and the sharding of parameters, activations and batches."""
