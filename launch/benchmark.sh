#!/usr/bin/env bash
# Measures training at the published shapes on this machine's accelerator, unattended: one size
# after the other, each against the compiled PyTorch step. Results are written as they arrive.
#
#   launch/benchmark.sh --output=benchmarks/h200 [--minutes=15] [--sizes=m,l,xl] [--dry_run]
#
#   --output     folder for a JSON file per size, and table.txt with the lines of all sizes
#   --minutes    time limit of the script; a size that is running then is stopped
#   --sizes      sizes of configs/calm.py, separated by commas
#   --platform   JAX platform: cuda, tpu, or cpu to try the script; by default JAX's own choice
#   --dry_run    print the commands and run nothing
#
# Uses the python on PATH, which needs calm_jax, torch and transformers.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

output="" minutes=15 sizes=m,l,xl platform=""
parse "output minutes sizes platform" "" "$@"
require output
whole minutes
[ ${#REST[@]} -eq 0 ] || fail "unexpected argument ${REST[0]}: see --help"
[ -z "$platform" ] || export JAX_PLATFORMS=$platform
# Sequences of 8,192 tokens per step: 0.2 to 0.4 s on an H200 at half its peak.
declare -A batch=([m]=8 [l]=8 [xl]=4)

[ -n "$dry_run" ] || mkdir -p "$output"
end=$((SECONDS + 60 * minutes))
for size in ${sizes//,/ }; do
  [ -n "${batch[$size]:-}" ] || fail "--sizes must be some of ${!batch[*]}, got $size"
done
for size in ${sizes//,/ }; do
  left=$((end - SECONDS))
  command=(timeout --kill-after=10 "$left" python -m calm_jax.benchmark --suite=train
    --config="configs/calm.py:$size" --config.training.batch="${batch[$size]}"
    --config.mesh.fsdp=1 --contenders="calm_jax,PyTorch compiled" --output="$output/calm-$size.json")
  if [ -n "$dry_run" ]; then
    quoted "${command[@]}"
    continue
  fi
  if [ "$left" -le 0 ]; then
    echo "no time left for $size" | tee -a "$output/table.txt"
    continue
  fi
  "${command[@]}" | tee -a "$output/table.txt" ||
    echo "calm.py:$size was stopped or failed" | tee -a "$output/table.txt"
done
