# shellcheck shell=bash
# Sourced by the launch scripts that take flags: parsing, errors, and commands that --dry_run only
# prints. A script's --help is the comment at its head.
dry_run=""
REST=()

# One line about bad input, and exit code 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# parse "NAMES" "SWITCHES" ARGUMENTS...: sets the variable of each --name=value and --switch, and
# REST to what comes behind the flags.
parse() {
  local values=" $1 " switches=" $2 dry_run " name
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        shift
        break
        ;;
      --help | -h)
        awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
        exit 0
        ;;
      --*=*)
        name=${1%%=*} && name=${name#--}
        [[ $values == *" $name "* ]] || fail "unknown flag --$name: see --help"
        [ -n "${1#*=}" ] || fail "--$name is empty"
        printf -v "$name" %s "${1#*=}"
        ;;
      --*)
        name=${1#--}
        [[ $values != *" $name "* ]] || fail "--$name needs a value: --$name=..."
        [[ $switches == *" $name "* ]] || fail "unknown flag $1: see --help"
        printf -v "$name" 1
        ;;
      *) break ;;
    esac
    shift
  done
  # shellcheck disable=SC2034 # Read by the scripts.
  REST=("$@")
}

# require NAME...: each variable was set.
require() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || fail "give --$name=...; see --help"
  done
}

# whole NAME...: each variable is a whole number of at least 1.
whole() {
  local name
  for name in "$@"; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "--$name must be a whole number from 1, got ${!name}"
  done
}

# The words as one line that a shell reads as the same words.
quoted() {
  local line
  printf -v line ' %q' "$@"
  echo "${line# }"
}

# Prints a command, and runs it unless --dry_run was given.
act() {
  echo "+ $(quoted "$@")" >&2
  [ -n "$dry_run" ] || "$@"
}
