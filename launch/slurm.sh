#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# GPU clusters with Slurm: submits a command as a batch job, one process a GPU or a node.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=24:00:00 -- python -m calm_jax.main ...
#
# Run it where the command is to run: on a file system that the nodes share, with calm_jax
# installed. Two minutes before the time is over, and when the job is preempted, the command gets
# SIGTERM; where it exits with 75 the job is queued again, any other exit code is final.
#
#   --per              gpu, one process for each GPU, or node, one for all GPUs of a node; gpu
#   --cpus_per_task    cores of each process
#   --max_requeues     how often the job is queued again, 50
#   --sbatch_flags     more flags for sbatch, such as "--partition=gpu --account=mine"
#   --name             of the job, calm_jax
#   --dry_run          print the command that would submit it, and the one it would run
set -euo pipefail

# step CPUS: sets STEP to the words before the command. A task that ended leaves the others two
# minutes to save what they have.
step() {
  STEP=(srun --kill-on-bad-exit=0 --wait=120 --gpu-bind=none)
  [ "$1" = 0 ] || STEP+=("--cpus-per-task=$1")
}

# In the job: slurm.sh job PER GPUS CPUS MAX_REQUEUES COMMAND...; it has no folder beside it there.
if [ "${1:-}" = job ]; then
  per=$2 gpus=$3 cpus=$4 max_requeues=$5
  shift 5
  # JAX gives each task the one GPU with its number on the node, where it is not told otherwise.
  [ "$per" = gpu ] || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  [ "$per" = gpu ] || export JAX_LOCAL_DEVICE_IDS
  code=0
  step "$cpus"
  "${STEP[@]}" "$@" || code=$?
  [ "$code" = 75 ] || exit "$code"
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
    echo "error: exit code 75 after $max_requeues requeues: given up" >&2
    exit 1
  fi
  exec scontrol requeue "$SLURM_JOB_ID"
fi

# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"
nodes="" gpus_per_node="" per=gpu time="" cpus_per_task="" max_requeues=50 sbatch_flags=""
name=calm_jax
parse "nodes gpus_per_node per time cpus_per_task max_requeues sbatch_flags name" "" "$@"
require nodes gpus_per_node
whole nodes gpus_per_node max_requeues
[ -z "$cpus_per_task" ] || whole cpus_per_task
case $per in
  gpu) tasks=$gpus_per_node ;;
  node) tasks=1 ;;
  *) fail "--per must be gpu or node, got $per" ;;
esac
[ ${#REST[@]} -gt 0 ] || fail "give the command to run behind --"
[ -n "$dry_run" ] || command -v sbatch >/dev/null || fail "sbatch is not there: no Slurm here?"

read -r -a more <<<"$sbatch_flags"
do_or_print sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$tasks" \
  --gpus-per-node="$gpus_per_node" ${time:+"--time=$time"} \
  ${cpus_per_task:+"--cpus-per-task=$cpus_per_task"} ${more[@]+"${more[@]}"} \
  "$0" job "$per" "$gpus_per_node" "${cpus_per_task:-0}" "$max_requeues" "${REST[@]}"
if [ -n "$dry_run" ]; then
  step "${cpus_per_task:-0}"
  echo "# In the job:"
  quoted "${STEP[@]}" "${REST[@]}"
fi
