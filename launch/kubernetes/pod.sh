#!/usr/bin/env bash
# Train in a pod. The manifests in this folder have it as their command:
#
#   launch/kubernetes/pod.sh RUN --config RECIPE [--section.field VALUE ...]
#
# Arguments and environment are those of launch/torchrun.sh. The numbers of nodes and of this node also come from
# Kubeflow's PET_* variables or the index of an Indexed Job.
#
# Turns RUN/status.json into the exit code that the manifests' failure policies read:
#   0    the run is finished, or was stopped by hand
#   75   start it again: it was preempted, killed, or failed after making progress
#   1    do not start it again
set -euo pipefail

[ $# -gt 0 ] || {
  echo "pod.sh: the run's folder is missing. usage: launch/kubernetes/pod.sh RUN --config RECIPE [--section.field VALUE ...]" >&2
  exit 1
}
python=${PYTHON:-python3}
export NNODES=${NNODES:-${PET_NNODES:-1}}
export NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-0}}}
[ -z "${PET_MASTER_ADDR:-}" ] || export RENDEZVOUS=${RENDEZVOUS:-$PET_MASTER_ADDR:${PET_MASTER_PORT:-29500}}

# Kubernetes signals only this process, the container's first, and the kernel drops signals that a first process does not
# trap. So the traps come before the start.
torchrun=
# shellcheck disable=SC2317 # called by the traps
stop() {
  [ -n "$torchrun" ] || exit 75
  kill -s "$1" "$torchrun" 2> /dev/null || true
}
trap 'stop TERM' TERM
trap 'stop USR1' USR1
"$(dirname "$0")/../torchrun.sh" "$@" &
torchrun=$!
# A trap ends `wait` early, while torchrun still works; the last `wait` returns the code of torchrun itself.
while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun" || true; done
code=0
wait "$torchrun" || code=$?
[ "$code" != 2 ] || exit 1 # torchrun.sh has refused its arguments

# The code below stands for the state of the run, also where a signal reaches every process of the pod now.
trap '' TERM USR1
again=0
"$python" -m xlstm_lm status "$1" --requeue || again=$?
case $again in
  0) code=75 ;;
  *) [ "$code" = 0 ] || code=1 ;;
esac
# The first pod's rank 0 writes status.json. The others wait, because the first code that Kubernetes sees decides.
[ "$code" = 0 ] || [ "$NODE_RANK" = 0 ] || sleep "${OTHERS_WAIT_SECONDS:-30}"
exit "$code"
