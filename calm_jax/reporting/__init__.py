"""Figures of finished or running runs -> tables, pictures, a page and a summary."""
