# shellcheck shell=bash
# Sourced by the other scripts with one argument, an extra of setup.py or "": makes .venv next to
# this folder, installs calm_jax there and puts it first on PATH. PYTHON is the interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: calm_jax needs Python 3.11 or newer, $PYTHON is $("$PYTHON" --version 2>&1):" \
    "set PYTHON=/path/to/python3.12" >&2
  exit 2
fi

version=$("$PYTHON" --version)
if [ "$(.venv/bin/python --version 2>/dev/null)" != "$version" ]; then
  echo "+ $PYTHON -m venv --clear .venv"
  "$PYTHON" -m venv --clear .venv
fi
# Installs once per content of setup.py and extra.
stamp=.venv/installed-$(cat setup.py <(echo "$1") | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  echo "+ .venv/bin/pip install -e .${1:+[$1]}"
  .venv/bin/pip install --quiet --disable-pip-version-check -e ".${1:+[$1]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
# On a CPU each step allocates new memory for its arrays, which is faster in large pages.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
