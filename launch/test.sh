#!/usr/bin/env bash
# Makes .venv, installs calm_jax and runs all tests, in 15 to 30 minutes on 2 cores, without network
# or accelerator. Arguments go to pytest: launch/test.sh tests/test_brier.py -k collapsed
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" dev
JAX_PLATFORMS=cpu exec python -m pytest --numprocesses=2 --dist=worksteal "$@"
