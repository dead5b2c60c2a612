"""The suites of `python -m calm_jax.benchmark`, and their measured figures."""
