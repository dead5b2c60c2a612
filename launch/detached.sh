#!/usr/bin/env bash
# Runs one command that continues when the connection to this machine ends.
#
#   launch/detached.sh [--folder=~/calm_jax_run] -- COMMAND...   starts it, unless one is running
#   launch/detached.sh --follow    shows its output until it ends; exits with its exit code
#   launch/detached.sh --status    prints one line: its state and the last line of its output
#   launch/detached.sh --stop      sends it SIGTERM
#   --dry_run                      print what would be started and start nothing
#
# The folder holds log, the output; pid, the id of the process and the clock tick of its start,
# because ids are reused; and exit_code, once the process has ended.
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

folder=$HOME/calm_jax_run follow="" status="" stop=""
parse "folder" "follow status stop" "$@"

# Prints the start of a process in clock ticks since boot; nothing without /proc.
began() {
  local fields
  read -r -a fields < <(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || true
  echo "${fields[19]:-}"
}

# Sets pid; fails unless the process that was started here is running.
running() {
  local start=""
  [ -e "$folder/pid" ] || return
  read -r pid start <"$folder/pid"
  kill -0 "$pid" 2>/dev/null && [ "$start" = "$(began "$pid")" ]
}

if [ -n "$follow" ]; then
  [ -e "$folder/pid" ] || fail "nothing was started: there is no $folder/pid"
  if running; then
    tail -n 100 -f --pid="$pid" "$folder/log"
  else
    tail -n 100 "$folder/log"
  fi
  for _ in $(seq 50); do # The exit code is written shortly after the process has ended.
    [ ! -e "$folder/exit_code" ] || exit "$(cat "$folder/exit_code")"
    sleep 0.1
  done
  echo "the run ended without an exit code, for example by a reboot: start it again" >&2
  exit 75
elif [ -n "$status" ]; then
  if running; then
    state="running"
  elif [ -e "$folder/exit_code" ]; then
    state="ended with $(cat "$folder/exit_code")"
  else
    state="nothing runs"
  fi
  echo "$(hostname): $state: $(tail -n 1 "$folder/log" 2>/dev/null)"
elif [ -n "$stop" ]; then
  running || fail "nothing runs"
  kill -TERM "$pid"
else
  [ ${#REST[@]} -gt 0 ] || fail "give the command to run after --"
  if running; then
    echo "running already: process $pid" >&2
    exit 0
  fi
  if [ -n "$dry_run" ]; then
    quoted "${REST[@]}"
    exit 0
  fi
  mkdir -p "$folder"
  rm -f "$folder/pid" "$folder/exit_code"
  export -f began
  # shellcheck disable=SC2016 # Expanded by the inner shell.
  setsid nohup bash -c '
    folder=$1
    shift
    "$@" &
    echo "$! $(began $!)" >"$folder/pid.new" && mv "$folder/pid.new" "$folder/pid"
    wait $!
    echo $? >"$folder/exit_code.new" && mv "$folder/exit_code.new" "$folder/exit_code"
  ' detached "$folder" "${REST[@]}" </dev/null >"$folder/log" 2>&1 &
  until [ -e "$folder/pid" ]; do sleep 0.05; done
  read -r pid _ <"$folder/pid"
  echo "started: process $pid, output in $folder/log" >&2
fi
