#!/usr/bin/env bash
# Runs a command, and again each time it exits with 75, which asks for another start.
#
#   launch/restart.sh [--attempts=10] [--wait=10] -- COMMAND...
#
#   --codes      exit codes that ask for another start, 75; 134 as well, as in --codes=75,134,
#                where JAX aborts the processes whose peer is gone
#   --attempts   restarts without progress before it gives up, with exit code 1
#   --wait       seconds before a restart, times the restarts without progress so far
#   --progress   a folder, local or gs://, where a new name is progress; by default the folder
#                checkpoints of the command's --workdir
#   --dry_run    print the command and run nothing
#
# Any other exit code ends it and is passed on. SIGTERM and SIGINT go to the command, once; after
# them there is no restart, and 75 is passed on: whoever sent the signal starts again.
set -uo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

attempts=10 wait=10 progress="" codes=75
parse "attempts wait progress codes" "" "$@"
[[ $attempts =~ ^[0-9]+$ ]] || fail "--attempts must be a whole number, got $attempts"
[[ $wait =~ ^[0-9]+$ ]] || fail "--wait must be a whole number of seconds, got $wait"
[[ $codes =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--codes must be numbers with commas, got $codes"
[ ${#REST[@]} -gt 0 ] || fail "give the command to run behind --"
command -v "${REST[0]}" >/dev/null || fail "no such command: ${REST[0]}"
for word in "${REST[@]}"; do
  case $word in --workdir=*) progress=${progress:-${word#--workdir=}/checkpoints} ;; esac
done

# The names in the folder of --progress; nothing where it can't be read.
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

# Runs in the background, where a signal can be passed on, and in a group of its own: Ctrl-C then
# reaches it through us alone, and is not ignored as in other background commands.
run() {
  local seen
  set -m
  "$@" &
  child=$!
  set +m
  # A signal that came before there was a child to have it.
  [ -z "$stopped" ] || [ -n "$passed" ] || kill -s "$stopped" "$child"
  code=127 again=1
  while [ -n "$again" ]; do # A signal ends wait before the command ends.
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
    echo "error: exit code $code again and no progress in $attempts restarts: given up" >&2
    exit 1
  fi
  echo "exit code $code: restart $restarts of $attempts without progress," \
    "in $((wait * restarts)) s" >&2
  for _ in $(seq $((wait * restarts))); do # A signal between two words is heeded in a second.
    [ -z "$stopped" ] || break
    sleep 1 &
    wait $!
  done
  [ -z "$stopped" ] || exit 75
done
