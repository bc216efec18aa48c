#!/usr/bin/env bash
# Checks and settings that torchrun.sh and deepspeed.sh share. They source this file:
#
#   source "$(dirname "${BASH_SOURCE[0]}")/shared.sh"
set -euo pipefail

refuse() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# check_arguments RUN --config RECIPE [...]
check_arguments() {
  local usage
  usage="usage: launch/$(basename "$0") RUN --config RECIPE [--section.field VALUE ...]"
  [ $# -gt 0 ] || refuse "the run's folder is missing. $usage"
  local run=$1
  shift
  case $run in -*) refuse "the first argument is the run's folder, such as runs/mine, but got the flag $run. $usage" ;; esac
  case " $* " in *" --config "* | *" --config="*) ;; *) refuse "--config RECIPE is missing. $usage" ;; esac
  case " $* " in *" --training.run_dir"*) refuse "--training.run_dir is given twice: the first argument, $run, sets it." ;; esac
}

# find_python PACKAGE: sets `python`, which has that package and xlstm_lm.
find_python() {
  python=$(command -v "${PYTHON:-python3}") ||
    refuse "there is no ${PYTHON:-python3}; set PYTHON to the path of a Python with xlstm-lm."
  local find="import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, ('$1', 'xlstm_lm'))))"
  "$python" -c "$find" 2> /dev/null ||
    refuse "$python has no $1 or no xlstm_lm; activate their environment (source .venv/bin/activate), or set PYTHON to the path of its Python."
}

# Keep caches on the node. On a network file system, many processes that compile at once fail or wait for each other.
use_caches_on_the_node() {
  local folder=${LOCAL_FOLDER:-${TMPDIR:-/tmp}/xlstm_lm-$(id -u)}
  # xlstm_lm/base/node_folder.py uses the folder only if nobody else can write to it.
  (umask 077 && mkdir -p "$folder")
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$folder/triton}
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$folder/torch_extensions}
  # `hf auth login` keeps its token in HF_HOME, which moves to the node; the token stays where it is.
  export HF_TOKEN_PATH=${HF_TOKEN_PATH:-${HF_HOME:-$HOME/.cache/huggingface}/token}
  export HF_HOME=${HF_HOME:-$folder/huggingface}
}

# make_log_folder RUN: sets `logs`, the folder of this start's logs.
make_log_folder() {
  logs=$1/logs/${ATTEMPT:-$(date -u +%Y%m%dT%H%M%SZ)}
  mkdir -p "$logs"
}
