"""CALM: continuous autoregressive language models in JAX."""

import time

__version__ = "0.1.0"

# When this process began, as near as a package can tell: seconds since the epoch.
STARTED = time.time()
