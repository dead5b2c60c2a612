"""Toy specimens, damage to them, and the acts that read them, for damage.py and faults.py."""
