# shellcheck shell=bash
# Sourced by the launch scripts that take flags: parsing, errors, and commands that --dry_run only
# prints. The --help of a script is the comment at its head.
dry_run=""
REST=()

# Prints one line about bad input and exits with 2.
fail() {
  echo "error: $*" >&2
  exit 2
}

# parse "NAMES" "SWITCHES" ARGUMENTS...: sets the variable of each --name=value and --switch, and
# REST to the words after the flags.
parse() {
  local values=" $1 " switches=" $2 dry_run " flag
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
        flag=${1%%=*} && flag=${flag#--}
        [[ $values == *" $flag "* ]] || fail "unknown flag --$flag: see --help"
        [ -n "${1#*=}" ] || fail "--$flag is empty"
        printf -v "$flag" %s "${1#*=}"
        ;;
      --*)
        flag=${1#--}
        [[ $values != *" $flag "* ]] || fail "--$flag needs a value: --$flag=..."
        [[ $switches == *" $flag "* ]] || fail "unknown flag $1: see --help"
        printf -v "$flag" 1
        ;;
      *) break ;;
    esac
    shift
  done
  # shellcheck disable=SC2034 # Read by the scripts.
  REST=("$@")
}

# require NAME...: fails unless each variable is set.
require() {
  local flag
  for flag in "$@"; do
    [ -n "${!flag}" ] || fail "give --$flag=...; see --help"
  done
}

# whole NAME...: fails unless each variable is an integer of at least 1.
whole() {
  local flag
  for flag in "$@"; do
    [[ ${!flag} =~ ^[1-9][0-9]*$ ]] || fail "--$flag must be a whole number from 1, got ${!flag}"
  done
}

# Prints the words as one line, quoted for a shell.
quoted() {
  local line="" word
  for word in "$@"; do
    [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Prints a command and runs it; with --dry_run only prints it, to standard output.
do_or_print() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}
