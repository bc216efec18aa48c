#!/usr/bin/env bash
# Start the processes of one node through torchrun. The Slurm script and the Kubernetes manifests run this on every node;
# by hand, run it on a single node, or on each of several with NNODES, NODE_RANK and RENDEZVOUS set.
#
#   launch/torchrun.sh RUN --config RECIPE [--config RECIPE ...] [--section.field VALUE ...]
#   NNODES=2 NODE_RANK=0 RENDEZVOUS=node1:29500 launch/torchrun.sh RUN --config RECIPE    # on node1; NODE_RANK=1 on node2
#
# RUN is the run's folder, training.run_dir, on a file system that every node sees. Environment:
#   PYTHON              a Python with xlstm-lm installed; default: python3
#   NNODES              number of nodes; default: 1
#   NODE_RANK           number of this node, from 0; needed if NNODES is above 1
#   RENDEZVOUS          HOST:PORT, where HOST is node 0 as the others reach it; needed if NNODES is above 1
#   RENDEZVOUS_ID       a word that all nodes of this start share; default: the run folder's name
#   PROCESSES_PER_NODE  default: one for each GPU, or 1 on a node without GPUs
#   ATTEMPT             folder of this start's logs below RUN/logs; default: the time in UTC
#   SAVE_SECONDS        seconds that the processes have for saving after a signal, before SIGKILL; default: 540
#   LOCAL_FOLDER        folder on this node for caches; default: that of xlstm_lm/base/node_folder.py, in TMPDIR or /tmp
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=shared.sh
source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"

check_arguments "$@"
run=$1
shift
nodes=${NNODES:-1}
node=${NODE_RANK:-0}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || refuse "NNODES is $nodes; set it to the number of nodes, such as 8."
if ! [[ $node =~ ^[0-9]+$ ]] || [ "$node" -ge "$nodes" ]; then
  refuse "NODE_RANK is $node; set it to a number from 0 to $((nodes - 1))."
fi
[ "$nodes" = 1 ] || [ -n "${NODE_RANK:-}" ] || refuse "NODE_RANK is not set; with $nodes nodes, number them from 0 to $((nodes - 1))."
[ "$nodes" = 1 ] || [ -n "${RENDEZVOUS:-}" ] || refuse "RENDEZVOUS is not set; with $nodes nodes, set it to HOST:PORT of node 0, such as node1:29500."
find_python torch
use_caches_on_the_node

# NCCL finds its network by itself on most clusters. Take out the comment where it does not:
# export NCCL_SOCKET_IFNAME=eth0       # the interface of its first contact, where nodes have several
# export NCCL_IB_HCA=mlx5              # only these InfiniBand adapters, where some are for storage
# export NCCL_DEBUG=WARN               # INFO prints the rings, the network and its speed at the start
# export TORCH_NCCL_TRACE_BUFFER_SIZE=2000  # the last collectives of each rank, dumped when one hangs

make_log_folder "$run"
if [ -z "${PROCESSES_PER_NODE:-}" ]; then
  if nvidia-smi -L > /dev/null 2>&1; then PROCESSES_PER_NODE=gpu; else PROCESSES_PER_NODE=1; fi
fi
rendezvous=(--standalone)
if [ "$nodes" -gt 1 ]; then
  # torchrun guesses from host names which node listens, and guesses wrong where a node has several names.
  listens=$([ "$node" = 0 ] && echo true || echo false)
  rendezvous=(
    --nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RENDEZVOUS_ID:-$(basename "$run")}"
    --rdzv-conf "is_host=$listens,join_timeout=900"
  )
fi
# The agent passes SIGUSR1 on to the processes and waits for them; unless told to, it dies of that signal. Restarts belong
# to the scheduler, which reads RUN/status.json. Rank 0 of each node also writes to the console, and all write to files.
exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$PROCESSES_PER_NODE" --max-restarts 0 \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SAVE_SECONDS:-540}" \
  --log-dir "$logs/node_$node" --redirects 3 --tee 0:3 -m xlstm_lm train "$@" --training.run_dir "$run"
