# Sourced by the other scripts: makes .venv beside this folder, installs calm_jax there and
# puts it first on PATH. EXTRAS names setup.py's extras; PYTHON the interpreter to start from.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: calm_jax needs Python 3.11 or newer, $PYTHON is $("$PYTHON" --version 2>&1):" \
    "set PYTHON=/path/to/python3.12" >&2
  exit 2
fi

# Installed once for each setup.py, interpreter and set of extras.
stamp=.venv/installed-$(cat setup.py <("$PYTHON" --version) <(echo "${EXTRAS:-}") | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  echo "+ $PYTHON -m venv .venv && .venv/bin/pip install -e .${EXTRAS:+[$EXTRAS]}"
  "$PYTHON" -m venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
