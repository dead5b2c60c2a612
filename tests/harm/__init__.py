"""Toys, what harms them, and the acts that meet the harm: for damage.py and faults.py."""
