#!/usr/bin/env bash
# Trains on Cloud TPU VMs: a single VM, a pod slice or several slices, as queued resources.
#
#   launch/tpu_pod.sh create  --name=N --zone=Z --type=v5p-128 [--slices=2] [--spot]
#   launch/tpu_pod.sh install --name=N --zone=Z [--slices=2]
#   launch/tpu_pod.sh run     --name=N --zone=Z [--slices=2] -- python -m calm_jax.main ...
#   launch/tpu_pod.sh watch   FLAGS OF create -- python -m calm_jax.main ...
#   launch/tpu_pod.sh follow | status | stop | delete  --name=N --zone=Z [--slices=2]
#
# create requests the machines. install copies the commit that is checked out here and installs it;
# with --clone=URL the workers fetch it from there. run starts the command on every worker and
# follows the first. The run continues without the connection; follow shows its output again.
# watch does all of this, and repeats it after each preemption, until the run ends with 0, 2 or
# another code that does not come from a preemption.
#
#   --type             accelerator type of a slice, as gcloud names it
#   --slices           number of slices; by default 1
#   --spot             use machines that can be preempted at any time
#   --runtime          software of the machines; by default the one for JAX on --type
#   --create_flags     more flags for gcloud's create, such as "--reserved --network=mine"
#   --project          by default gcloud's
#   --clone            URL of a git repository that the workers can read
#   --attempts         most restarts without progress; by default 10, see launch/restart.sh
#   --poll             seconds between two checks of watch; by default 60
#   --dry_run          print the commands and run nothing
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

name="" zone="" type="" slices=1 spot="" runtime="" create_flags="" project="" clone=""
attempts=10 poll=60
act=${1:-}
[[ $act == --* ]] || shift || true
parse "name zone type slices runtime create_flags project clone attempts poll" "spot" "$@"
case $act in
  create | install | run | watch | follow | status | stop | delete) ;;
  *) fail "give one of create, install, run, watch, follow, status, stop, delete; see --help" ;;
esac
require name zone
whole slices attempts poll
place=("--zone=$zone" ${project:+"--project=$project"})
resources=(gcloud compute tpus queued-resources)

# on WORKERS LINE: runs a shell line on all workers, or on worker 0 of slice 0.
on() {
  local ssh=(gcloud compute tpus tpu-vm ssh)
  [ "$slices" = 1 ] || ssh=("${resources[@]}" ssh "--node=$1")
  do_or_print "${ssh[@]}" "$name" "${place[@]}" --worker="$1" --command="$2"
}

create() {
  local nodes=("--node-id=$name")
  [ "$slices" = 1 ] || nodes=("--node-count=$slices" "--node-prefix=$name")
  local more
  read -r -a more <<<"$create_flags"
  do_or_print "${resources[@]}" create "$name" "${place[@]}" --accelerator-type="$type" \
    --runtime-version="$runtime" "${nodes[@]}" ${spot:+--spot} ${more[@]+"${more[@]}"}
}

# The machines' own Python may be older than 3.11, so Python 3.12 is fetched.
# shellcheck disable=SC2016 # Expanded by the workers' shells.
INSTALL='cd ~/calm_jax && python3 -m pip install --quiet --user uv \
  && python3 -m uv python install --quiet 3.12 \
  && export PYTHON="$(python3 -m uv python find --system 3.12)" \
  && bash -e -c "source launch/environment.sh tpu"'
INSTALL=${INSTALL//$' \\\n '/}

install() {
  local archive=calm_jax-$commit.tar.gz
  if [ -n "$clone" ]; then
    local fetch
    fetch="{ [ -e ~/calm_jax ] || git clone --quiet $(quoted "$clone") ~/calm_jax; }"
    fetch+=" && git -C ~/calm_jax fetch --quiet && git -C ~/calm_jax checkout --quiet $commit"
    on all "$fetch && $INSTALL"
    return
  fi
  local copy=(gcloud compute tpus tpu-vm scp)
  [ "$slices" = 1 ] || copy=("${resources[@]}" scp --node=all)
  do_or_print git archive --format=tar.gz --output="${TMPDIR:-/tmp}/$archive" "$commit" &&
    do_or_print "${copy[@]}" "${TMPDIR:-/tmp}/$archive" "$name:" "${place[@]}" --worker=all &&
    on all "mkdir -p ~/calm_jax && tar -xzf ~/$archive -C ~/calm_jax && $INSTALL"
}

# shellcheck disable=SC2016 # Expanded by the workers' shells.
HERE='cd ~/calm_jax && PATH="$PWD/.venv/bin:$PATH" launch/detached.sh'

run() {
  local again="launch/restart.sh --attempts=$attempts --codes=75,134"
  on all "$HERE -- $again -- $(quoted "${REST[@]}")" &&
    on 0 "$HERE --follow"
}

# Prints the state of the machines: ACTIVE, SUSPENDED and so on; ABSENT if there are none; UNKNOWN
# if gcloud fails.
state() {
  local answer
  if answer=$("${resources[@]}" describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN
    echo "$answer" >&2
  fi
}

delete() { do_or_print "${resources[@]}" delete "$name" "${place[@]}" --force --quiet; }

watch() {
  local before="" now code installed=""
  while true; do
    now=$(state)
    [ "$now" = "$before" ] || echo "$(date +%FT%T) $name: $now" >&2
    before=$now
    case $now in
      ACTIVE)
        [ -n "$installed" ] || ! install || installed=1
        if [ -n "$installed" ]; then
          code=0
          run || code=$?
          case $code in
            0 | 2) exit "$code" ;;
            75 | 255) ;; # A restart is requested; the connection ended.
            *)           # Perhaps because the machines are being taken away.
              sleep "$poll"
              [ "$(state)" != ACTIVE ] || exit "$code"
              ;;
          esac
        fi
        ;;
      SUSPENDED | FAILED)
        installed=""
        ! delete || create || true
        ;;
      ABSENT)
        installed=""
        create || true
        ;;
    esac
    sleep "$poll"
  done
}

case $act in
  create | watch)
    require type
    case $type in
      v5p-*) default=v2-alpha-tpuv5 ;;
      v5litepod-*) default=v2-alpha-tpuv5-lite ;;
      v6e-*) default=v2-alpha-tpuv6e ;;
      v2-* | v3-* | v4-*) default=tpu-ubuntu2204-base ;;
      *) default="" ;;
    esac
    runtime=${runtime:-$default}
    [ -n "$runtime" ] || fail "give --runtime=...: there is no default for --type=$type"
    ;;
esac
case $act in
  run | watch) [ ${#REST[@]} -gt 0 ] || fail "give the command to run after --" ;;
  *) [ ${#REST[@]} = 0 ] || fail "unexpected argument ${REST[0]}" ;;
esac
case $act in
  install | watch)
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || fail "$PWD is not a git checkout"
    git diff --quiet HEAD || echo "uncommitted changes are not installed; the commit is $commit" >&2
    ;;
esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install"

case $act in
  follow) on 0 "$HERE --follow" ;;
  stop) on all "$HERE --stop" ;;
  status)
    do_or_print "${resources[@]}" describe "$name" "${place[@]}" --format='value(state.state)'
    on all "$HERE --status"
    ;;
  watch)
    if [ -n "$dry_run" ]; then
      echo "# Every $poll s:"
      quoted "${resources[@]}" describe "$name" "${place[@]}" --format='value(state.state)'
      echo "# When it is SUSPENDED or FAILED:"
      delete
      echo "# Then, and when it is ABSENT:"
      create
      echo "# When it is ACTIVE, until the run ends with 0 or 2:"
      install
      run
    else
      watch
    fi
    ;;
  *) "$act" ;;
esac
