#!/usr/bin/env bash
# Runs a command on one machine with NVIDIA GPUs: makes .venv, installs calm_jax with a CUDA version
# that the driver supports, and runs the command under launch/restart.sh.
#
#   launch/gpu_node.sh -- python -m calm_jax.main --config=configs/calm.py:m --workdir=W ...
#
#   --cuda       13 or 12; by default 13 for drivers from 580 on, 12 for drivers from 525 on
#   --attempts   most restarts without progress; by default 10, see launch/restart.sh
#   --dry_run    print the commands and run nothing
#
# PYTHON is the interpreter, as in launch/quickstart.sh.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

cuda="" attempts=10
parse "cuda attempts" "" "$@"
whole attempts
[ ${#REST[@]} -gt 0 ] || fail "give the command to run after --"
command -v nvidia-smi >/dev/null || fail "nvidia-smi is missing: is the NVIDIA driver installed?"
gpus=$(nvidia-smi --query-gpu=driver_version,name,memory.total --format=csv,noheader) ||
  fail "nvidia-smi found no GPU: $gpus"
echo "$gpus" >&2
driver=${gpus%%.*}
[[ $driver =~ ^[0-9]+$ ]] || fail "nvidia-smi reports no driver version: $gpus"
if [ -z "$cuda" ]; then
  [ "$driver" -ge 525 ] || fail "driver $driver is too old for CUDA 12, which needs 525"
  cuda=$((driver >= 580 ? 13 : 12))
fi
case $cuda in
  12) extra=cuda12 ;;
  13) extra=cuda ;;
  *) fail "--cuda must be 12 or 13, got $cuda" ;;
esac

if [ -n "$dry_run" ]; then
  echo "source launch/environment.sh $extra"
  quoted launch/restart.sh --attempts="$attempts" -- "${REST[@]}"
  exit 0
fi
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$extra"
[ -z "${LD_LIBRARY_PATH:-}" ] ||
  echo "LD_LIBRARY_PATH is set: its libraries take precedence over the installed ones" >&2
exec launch/restart.sh --attempts="$attempts" -- "${REST[@]}"
