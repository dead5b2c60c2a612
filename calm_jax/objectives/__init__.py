"""Samples -> numbers: losses and scores as pure functions of arrays."""
