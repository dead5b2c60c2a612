"""Speeds, measured: each suite compares ways to the same figures within one run."""
