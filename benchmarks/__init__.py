"""What `python -m calm_jax.benchmark` runs, and its measured figures."""
