"""Figures of training runs -> tables, pictures, a page and a summary."""
