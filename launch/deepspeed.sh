#!/usr/bin/env bash
# Train through DeepSpeed's own launcher: on this machine, or on the nodes of a hostfile, which it reaches through ssh.
#
#   launch/deepspeed.sh RUN --config RECIPE [--config RECIPE ...] [--section.field VALUE ...]
#   HOSTFILE=hosts.txt launch/deepspeed.sh RUN --config RECIPE
#
# RUN is the run's folder, training.run_dir, on a file system that every node sees. Environment:
#   PYTHON              a Python with xlstm-lm installed, at the same path on every node; default: python3
#   HOSTFILE            nodes, as in launch/hostfile.example; default: none, which means this machine
#   MASTER              host of rank 0 as the others reach it; default: the first address of the first node
#   MASTER_PORT         default: 29500
#   SSH_PORT            default: that of ssh
#   PROCESSES_PER_NODE  default: the slots of the hostfile, or one for each GPU
#   ATTEMPT             folder of this start's logs below RUN/logs; default: the time in UTC
#
# What the ranks print is in RUN/logs/ATTEMPT, a file for each, and not on the console.
#
# On several nodes this needs pdsh here, and ssh without a password to each node from here. The launcher kills a node's
# processes 30 seconds after a signal, with no setting to change it, and nothing starts a run again: prefer torchrun under
# a scheduler where saving takes longer. To stop a run and save it, signal the processes themselves and not the launcher:
#   pdsh -R ssh -w NODE1,NODE2 'pkill -USR1 -f "xlstm_lm train.* --training.run_dir RUN"'
set -euo pipefail

refuse() {
  echo "deepspeed.sh: $1" >&2
  exit 2
}

usage="usage: launch/deepspeed.sh RUN --config RECIPE [--section.field VALUE ...]"
[ $# -gt 0 ] || refuse "the run's folder is missing. $usage"
run=$1
shift
case $run in -*) refuse "the first argument is the run's folder, such as runs/mine, but got the flag $run. $usage" ;; esac
case " $* " in *" --config "* | *" --config="*) ;; *) refuse "--config RECIPE is missing. $usage" ;; esac
case " $* " in *" --training.run_dir"*) refuse "--training.run_dir is given twice: the first argument, $run, sets it." ;; esac
python=$(command -v "${PYTHON:-python3}") || refuse "there is no ${PYTHON:-python3}; set PYTHON to the path of a Python with xlstm-lm."
find='import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ("deepspeed", "xlstm_lm"))))'
"$python" -c "$find" 2> /dev/null ||
  refuse "$python has no deepspeed or no xlstm_lm; activate their environment (source .venv/bin/activate), or set PYTHON."

nodes=(--hostfile /dev/null)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || refuse "there is no hostfile $HOSTFILE; copy launch/hostfile.example and name your nodes in it."
  command -v pdsh > /dev/null || refuse "pdsh is not installed here, and DeepSpeed starts other nodes through it: install it, or use launch/torchrun.sh."
  nodes=(--hostfile "$HOSTFILE" --force_multi --master_port "${MASTER_PORT:-29500}")
  [ -z "${MASTER:-}" ] || nodes+=(--master_addr "$MASTER")
  [ -z "${SSH_PORT:-}" ] || nodes+=(--ssh_port "$SSH_PORT")
fi
[ -z "${PROCESSES_PER_NODE:-}" ] || nodes+=(--num_gpus "$PROCESSES_PER_NODE")

logs=$run/logs/${ATTEMPT:-$(date -u +%Y%m%dT%H%M%SZ)}
mkdir -p "$logs"
# The launcher sets these variables on every node: caches on the node, not on a network file system.
local_folder=${LOCAL_FOLDER:-${TMPDIR:-/tmp}/xlstm_lm-$(id -u)}
export DS_ENV_FILE=$PWD/$logs/environment
case $logs in /*) DS_ENV_FILE=$logs/environment ;; esac
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$local_folder/triton}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$local_folder/torch_extensions}
export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}
export HF_HOME=${HF_HOME:-$local_folder/huggingface}
for name in TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR HF_TOKEN_PATH HF_HOME OMP_NUM_THREADS NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG; do
  [ -z "${!name:-}" ] || echo "$name=${!name}"
done > "$DS_ENV_FILE"

exec "$python" -m deepspeed.launcher.runner "${nodes[@]}" --enable_each_rank_log "$logs" --module xlstm_lm train "$@" \
  --training.run_dir "$run"
