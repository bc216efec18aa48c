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
#   LOCAL_FOLDER        folder on each node for caches; default: that of xlstm_lm/base/node_folder.py, in TMPDIR or /tmp
#
# What the ranks print is in RUN/logs/ATTEMPT, a file for each, and not on the console.
#
# On several nodes this needs pdsh here, and ssh without a password to each node from here. The launcher kills a node's
# processes 30 seconds after a signal, with no setting to change it, and nothing starts a run again: prefer torchrun under
# a scheduler where saving takes longer. To stop a run and save it, signal the processes themselves and not the launcher:
#   pdsh -R ssh -w NODE1,NODE2 'pkill -USR1 -f "xlstm_lm train.* --training.run_dir RUN"'
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

check_arguments "$@"
run=$1
shift
find_python deepspeed

nodes=(--hostfile /dev/null)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || refuse "there is no hostfile $HOSTFILE; copy launch/hostfile.example and name your nodes in it."
  command -v pdsh > /dev/null || refuse "pdsh is not installed here, and DeepSpeed starts other nodes through it: install it, or use launch/torchrun.sh."
  nodes=(--hostfile "$HOSTFILE" --force_multi --master_port "${MASTER_PORT:-29500}")
  [ -z "${MASTER:-}" ] || nodes+=(--master_addr "$MASTER")
  [ -z "${SSH_PORT:-}" ] || nodes+=(--ssh_port "$SSH_PORT")
fi
[ -z "${PROCESSES_PER_NODE:-}" ] || nodes+=(--num_gpus "$PROCESSES_PER_NODE")

make_log_folder "$run"
use_caches_on_the_node
# The launcher sets the variables of this file on every node.
export DS_ENV_FILE=$PWD/$logs/environment
case $logs in /*) DS_ENV_FILE=$logs/environment ;; esac
for name in TRITON_CACHE_DIR TORCH_EXTENSIONS_DIR HF_TOKEN_PATH HF_HOME OMP_NUM_THREADS NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_DEBUG; do
  [ -z "${!name:-}" ] || echo "$name=${!name}"
done > "$DS_ENV_FILE"

exec "$python" -m deepspeed.launcher.runner "${nodes[@]}" --enable_each_rank_log "$logs" --module xlstm_lm train "$@" \
  --training.run_dir "$run"
