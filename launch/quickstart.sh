#!/usr/bin/env bash
# Runs the complete pipeline on one machine without an accelerator: corpus -> tokenizer -> token
# store -> autoencoder -> language model -> tempered head -> texts -> report. Takes at most 12
# minutes on 2 cores and 6 GB. When run again, it resumes. QUICKSTART_DIR is the folder of its output.
set -euo pipefail
began=$(date +%s)
case ${QUICKSTART_DIR:=} in
  "" | /*) ;;
  *) QUICKSTART_DIR=$PWD/$QUICKSTART_DIR ;;
esac
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ""

DIR=${QUICKSTART_DIR:-runs/quickstart}
mkdir -p "$DIR"
TIMES=$DIR/seconds.tsv # One line per attempt: step, seconds, finished or stopped.
touch "$TIMES"
printf 'install\t%s\tfinished\n' $(($(date +%s) - began)) >>"$TIMES"

# step NAME COMMAND...: prints and runs a command, unless an earlier run of this script finished it.
step() {
  local name=$1 start status=0
  shift
  if grep -q "^$name"$'\t.*\tfinished$' "$TIMES"; then
    echo "= $name: already finished"
    return
  fi
  printf '\n+'
  printf ' %q' "$@"
  echo
  start=$(date +%s)
  "$@" || status=$?
  printf '%s\t%s\t%s\n' "$name" $(($(date +%s) - start)) \
    "$([ "$status" = 0 ] && echo finished || echo stopped)" >>"$TIMES"
  return "$status"
}

step prepare python -m calm_jax.prepare --input=stdlib: --tokenizer=train:1024 \
  --output="$DIR/tokens"
step autoencoder python -m calm_jax.main --config=configs/autoencoder.py:quickstart \
  --config.data.path="$DIR/tokens" --workdir="$DIR/autoencoder"
step evaluate_autoencoder python -m calm_jax.evaluate --workdir="$DIR/autoencoder"
step calm python -m calm_jax.main --config=configs/calm.py:quickstart \
  --config.data.path="$DIR/tokens" --config.autoencoder="$DIR/autoencoder" --workdir="$DIR/calm"
step evaluate_calm python -m calm_jax.evaluate --workdir="$DIR/calm"
step generate_1 python -m calm_jax.generate --workdir="$DIR/calm" \
  --prompt=$'class Reader:\n    def __init__(self' --max_tokens=256
step tempered python -m calm_jax.main --config=configs/tempered.py:quickstart \
  --config.data.path="$DIR/tokens" --config.calm="$DIR/calm" --workdir="$DIR/tempered"
step generate_2 python -m calm_jax.generate --workdir="$DIR/tempered" --temperature=0.5 \
  --max_tokens=72 --prompt="    '\\xc0'     #  0xC0 -> LATIN CAPITAL LETTER A WITH GRAVE
    '\\xc1'     #  0xC1 -> LATIN CAPITAL LETTER A WITH ACUTE
    '\\xc2'     #  0xC2 -> LATIN CAPITAL LETTER A WITH CIRCUMFLEX
"

seconds=$(awk -F'\t' '{total += $2} END {print total}' "$TIMES")
report=(python -m calm_jax.report --workdir="$DIR/autoencoder,$DIR/calm,$DIR/tempered" --output="$DIR"
  --seconds_total="$seconds")
printf '\n+'
printf ' %q' "${report[@]}"
echo
"${report[@]}"
