#!/usr/bin/env bash
# Trains on TPU slices in GKE: fills in launch/jobset.yaml and applies it.
#
#   launch/gke.sh [apply] --topology=v5p:4x4x4 --image=I --config=configs/calm.py:xl \
#     --workdir=gs://BUCKET/W [--slices=2] [-- --config.data.path=gs://BUCKET/DATA ...]
#   launch/gke.sh xpk --cluster=C ...    prints a similar command of xpk
#   launch/gke.sh status | delete [--name=calm-jax] [--namespace=default]
#
# The cluster needs the JobSet controller and a node pool for each slice; the image needs calm_jax
# with its extra tpu, and Python as "python". Words after -- are passed to calm_jax.main.
#
#   --topology         TPU type and chips of a slice: v4, v5e, v5p, v6e or tpu7x, a colon, and 4x4
#                      or 2x2x2
#   --slices           number of slices; by default 1
#   --chips_per_host   by default 4, or all chips of a smaller slice; 8 for v5e or v6e hosts of 8
#   --max_restarts     most restarts of the set; by default 50
#   --service_account  Kubernetes account that may read and write the bucket; by default "default"
#   --spot             use spot machines
#   --dry_run          print the manifest, or the command, and do nothing
set -euo pipefail
# shellcheck source=launch/flags.sh
source "$(dirname "${BASH_SOURCE[0]}")/flags.sh"

name=calm-jax namespace=default topology="" slices=1 image="" config="" workdir=""
chips_per_host="" max_restarts=50 service_account=default spot="" cluster=""
act=apply
case ${1:-} in
  "" | -*) ;;
  *)
    act=$1
    shift
    ;;
esac
parse "name namespace topology slices image config workdir chips_per_host max_restarts \
service_account cluster" "spot" "$@"
for flag in name namespace service_account; do
  [[ ${!flag} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--$flag must be up to 40 of a-z, 0-9 and -, beginning with a letter, got ${!flag}"
done

# Prints words as a JSON array, which is also YAML.
json() {
  local word line=""
  for word in "$@"; do
    word=${word//\\/\\\\}
    word=${word//\"/\\\"}
    line+=", \"$word\""
  done
  echo "[${line#, }]"
}

# Prints the manifest, filled in.
manifest() {
  local text value
  text=$(<"$(dirname "${BASH_SOURCE[0]}")/jobset.yaml")
  [ -n "$spot" ] || text=$(grep -v 'gke-spot' <<<"$text")
  for value in NAME="$name" NAMESPACE="$namespace" SLICES="$slices" HOSTS="$hosts" \
    CHIPS="$chips_per_host" MAX_RESTARTS="$max_restarts" SERVICE_ACCOUNT="$service_account" \
    ACCELERATOR="$accelerator" TOPOLOGY="$shape" IMAGE="$(json "$image" | tr -d '[]')" \
    COMMAND="$(json "${command[@]}")"; do
    text=${text//"\${${value%%=*}}"/"${value#*=}"}
  done
  echo "$text"
}

case $act in
  apply | xpk)
    [[ ${REST[0]:---} == --* ]] || fail "unexpected argument ${REST[0]}: see --help"
    require topology image config workdir
    whole slices max_restarts
    [[ $workdir == gs://* ]] || fail "--workdir must be in a bucket, gs://..., got $workdir"
    [[ $image$config$workdir != *[$'\n\t ']* ]] ||
      fail "--image, --config and --workdir must have no spaces"
    tpu=${topology%%:*} shape=${topology#*:}
    [[ $topology =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
      fail "--topology must be like v5p:4x4x4 or v6e:4x8, got $topology"
    # GKE's name, the prefix of xpk's types, and the TensorCores per chip that these count.
    case $tpu in
      v4) accelerator=tpu-v4-podslice prefix=v4 cores=2 ;;
      v5e) accelerator=tpu-v5-lite-podslice prefix=v5litepod cores=1 ;;
      v5p) accelerator=tpu-v5p-slice prefix=v5p cores=2 ;;
      v6e) accelerator=tpu-v6e-slice prefix=v6e cores=1 ;;
      tpu7x) accelerator=tpu7x prefix=tpu7x cores=2 ;;
      *) fail "--topology must begin with v4, v5e, v5p, v6e or tpu7x, got $tpu" ;;
    esac
    chips=$((${shape//x/*}))
    chips_per_host=${chips_per_host:-$((chips < 4 ? chips : 4))}
    whole chips_per_host
    [ $((chips % chips_per_host)) = 0 ] ||
      fail "$chips chips are not a multiple of --chips_per_host=$chips_per_host"
    hosts=$((chips / chips_per_host))
    command=(python -m calm_jax.main --config="$config" --workdir="$workdir"
      ${REST[@]+"${REST[@]}"})
    ;;
  status | delete) [ ${#REST[@]} = 0 ] || fail "unexpected argument ${REST[0]}" ;;
  *) fail "give one of apply, xpk, status, delete, or only flags for apply; see --help" ;;
esac
[ "$act" = xpk ] || [ -n "$dry_run" ] || command -v kubectl >/dev/null ||
  fail "kubectl is not installed: see https://kubernetes.io/docs/tasks/tools"

case $act in
  apply)
    if [ -n "$dry_run" ]; then
      echo "# kubectl apply -f -"
      manifest
    else
      manifest | kubectl apply -f -
    fi
    ;;
  xpk)
    require cluster
    quoted xpk workload create --cluster="$cluster" --workload="$name" \
      --tpu-type="$prefix-$((chips * cores))" --num-slices="$slices" --docker-image="$image" \
      --max-restarts="$max_restarts" --restart-on-exit-codes=75 \
      --termination-grace-period-seconds=300 --command="$(quoted "${command[@]}")"
    ;;
  status)
    do_or_print kubectl get jobset "$name" --namespace="$namespace"
    do_or_print kubectl get pods --namespace="$namespace" \
      --selector="jobset.sigs.k8s.io/jobset-name=$name"
    ;;
  delete) do_or_print kubectl delete jobset "$name" --namespace="$namespace" ;;
esac
