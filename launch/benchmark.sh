#!/usr/bin/env bash
# Measures training at the published shapes on this machine's accelerator, unattended: sizes one
# after the other, each beside the compiled PyTorch step, what is done written as it is done.
#
#   launch/benchmark.sh --output=benchmarks/h200 [--minutes=15] [--sizes=m,l,xl] [--dry_run]
#
#   --output     folder for a JSON file a size, and table.txt with the lines of all
#   --minutes    after which the size at work is given up
#   --sizes      of configs/calm.py, with commas between
#   --platform   of JAX: cuda, tpu, or cpu to try the script; by default JAX's own choice
#   --dry_run    print the commands and run nothing
#
# Takes the python on PATH, with calm_jax, torch and transformers installed.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

output="" minutes=15 sizes=m,l,xl platform=""
parse "output minutes sizes platform" "" "$@"
require output
whole minutes
[ ${#REST[@]} -eq 0 ] || fail "nothing is taken behind --"
[ -z "$platform" ] || export JAX_PLATFORMS=$platform
# Sequences of 8,192 tokens a step: 0.2 to 0.4 s of an H200 at half its peak.
declare -A batch=([m]=8 [l]=8 [xl]=4)

[ -n "$dry_run" ] || mkdir -p "$output"
end=$((SECONDS + 60 * minutes))
for size in ${sizes//,/ }; do
  [ -n "${batch[$size]:-}" ] || fail "--sizes are of ${!batch[*]}, got $size"
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
    echo "calm.py:$size was given up or failed" | tee -a "$output/table.txt"
done
