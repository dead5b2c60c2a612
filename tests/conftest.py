"""Eight CPU devices, no accelerator, and a shape mismatch that broadcasting would hide is an error."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402 -- reads the environment when it is imported.

jax.config.update("jax_numpy_rank_promotion", "raise")
