"""Devices, and what of the model and the data lies on which."""
