"""CALM: continuous autoregressive language models in JAX."""

import time

__version__ = "0.1.0"

# Approximate start of this process, in seconds since the epoch.
STARTED = time.time()
