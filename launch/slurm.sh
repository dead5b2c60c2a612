#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Submits a command as a batch job to a GPU cluster with Slurm, one process per GPU or per node.
#
#   launch/slurm.sh --nodes=4 --gpus_per_node=8 --time=24:00:00 -- python -m calm_jax.main ...
#
# Run it in the folder in which the command should run: on a file system that the nodes share, with
# calm_jax installed. Two minutes before the time limit, and when the job is preempted, the command
# gets SIGTERM. If it exits with 75 the job is queued again; any other exit code is final.
#
#   --per              gpu, one process per GPU, or node, one process for all GPUs of a node; by
#                      default gpu
#   --cpus_per_task    cores of each process
#   --max_requeues     most times that the job is queued again; by default 50
#   --sbatch_flags     more flags for sbatch, such as "--partition=gpu --account=mine"
#   --name             name of the job; by default calm_jax
#   --dry_run          print the command that would submit the job, and the command of the job
set -euo pipefail

# step CPUS: sets STEP to the words before the command. When a task has ended, the others have two
# minutes to save their state.
step() {
  STEP=(srun --kill-on-bad-exit=0 --wait=120 --gpu-bind=none)
  [ "$1" = 0 ] || STEP+=("--cpus-per-task=$1")
}

# In the job: slurm.sh job PER GPUS CPUS MAX_REQUEUES COMMAND...; Slurm runs a copy of this script
# without the files next to it.
if [ "${1:-}" = job ]; then
  per=$2 gpus=$3 cpus=$4 max_requeues=$5
  shift 5
  # By default JAX gives each task the GPU with the task's number on the node.
  [ "$per" = gpu ] || JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))
  [ "$per" = gpu ] || export JAX_LOCAL_DEVICE_IDS
  code=0
  step "$cpus"
  "${STEP[@]}" "$@" || code=$?
  [ "$code" = 75 ] || exit "$code"
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$max_requeues" ]; then
    echo "error: exit code 75 after $max_requeues requeues: giving up" >&2
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
[ ${#REST[@]} -gt 0 ] || fail "give the command to run after --"
[ -n "$dry_run" ] || command -v sbatch >/dev/null ||
  fail "sbatch is missing: is Slurm installed here?"

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
