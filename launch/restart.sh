#!/usr/bin/env bash
# Runs a command, and runs it again each time it exits with 75, which requests a restart.
#
#   launch/restart.sh [--attempts=10] [--wait=10] -- COMMAND...
#
#   --codes      exit codes that request a restart; by default 75. --codes=75,134 if JAX may abort
#                processes whose peer is lost
#   --attempts   most restarts without progress; after them the script exits with 1
#   --wait       seconds before a restart, times the restarts without progress so far
#   --progress   a folder, local or gs://, in which a new name counts as progress; by default the
#                folder checkpoints of the command's --workdir
#   --dry_run    print the command and run nothing
#
# Any other exit code ends the script and is passed on. SIGTERM and SIGINT are passed to the
# command, once; after them there is no restart, and 75 is passed on: the sender of the signal
# restarts the run.
set -uo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

attempts=10 wait=10 progress="" codes=75
parse "attempts wait progress codes" "" "$@"
[[ $attempts =~ ^[0-9]+$ ]] || fail "--attempts must be a whole number, got $attempts"
[[ $wait =~ ^[0-9]+$ ]] || fail "--wait must be a whole number of seconds, got $wait"
[[ $codes =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--codes must be numbers separated by commas, got $codes"
[ ${#REST[@]} -gt 0 ] || fail "give the command to run after --"
command -v "${REST[0]}" >/dev/null || fail "no such command: ${REST[0]}"
for word in "${REST[@]}"; do
  case $word in --workdir=*) progress=${progress:-${word#--workdir=}/checkpoints} ;; esac
done

# Prints the names in the folder of --progress; nothing if it can't be read.
names() {
  case $progress in
    "") ;;
    gs://*) gcloud storage ls "$progress/" 2>/dev/null ;;
    *) ls -A "$progress" 2>/dev/null ;;
  esac
}

stopped="" passed="" child=""
pass_on() {
  stopped=$1 again=1
  if [ -n "$child" ]; then
    passed=1
    kill -s "$1" "$child" 2>/dev/null
  fi
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# Runs the command in the background, so that signals can be passed on, and in its own process
# group, so that Ctrl-C reaches it once, through this script, and is not ignored as in other jobs.
run() {
  local seen
  set -m
  "$@" &
  child=$!
  set +m
  # Passes on a signal that arrived before the command was started.
  [ -z "$stopped" ] || [ -n "$passed" ] || kill -s "$stopped" "$child"
  code=127 again=1
  while [ -n "$again" ]; do # A signal interrupts wait.
    again=""
    wait "$child"
    seen=$?
    [ "$seen" = 127 ] || code=$seen
  done
  child=""
}

if [ -n "$dry_run" ]; then
  quoted "${REST[@]}"
  exit 0
fi
restarts=0
before=$(names)
while true; do
  run "${REST[@]}"
  [[ ,$codes, == *",$code,"* && -z $stopped ]] || exit "$code"
  now=$(names)
  [ "$now" = "$before" ] || restarts=0
  before=$now
  restarts=$((restarts + 1))
  if [ "$restarts" -gt "$attempts" ]; then
    echo "error: exit code $code again and no progress in $attempts restarts: giving up" >&2
    exit 1
  fi
  echo "exit code $code: restart $restarts of $attempts without progress," \
    "in $((wait * restarts)) s" >&2
  for _ in $(seq $((wait * restarts))); do # So that a signal takes effect within a second.
    [ -z "$stopped" ] || break
    sleep 1 &
    wait $!
  done
  [ -z "$stopped" ] || exit 75
done
