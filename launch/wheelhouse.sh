#!/usr/bin/env bash
# Collect what nodes without internet need: wheels, compiled CPU kernels, and the tokenizer and data of recipes.
#
#   launch/wheelhouse.sh OUT [RECIPE ...]      # here, with internet
#   bash OUT/install.sh ENVIRONMENT            # there, without: makes a Python environment, and prints how to train in it
#
# Run this with the Python version, the operating system and the kind of processor of the nodes: wheels and kernels are
# made for those of this machine. Kernels of another processor are built again there, if there is a compiler. Move OUT to a
# file system that every node sees before you fetch data, because OUT/offline.yaml names the files by their full path.
# Environment:
#   PYTHON   default: python3
#   EXTRAS   extras of xlstm-lm to install; default: gpu; empty for nodes without GPUs
set -euo pipefail

refuse() {
  echo "wheelhouse.sh: $1" >&2
  exit 2
}

[ $# -gt 0 ] || refuse "the folder to fill is missing. usage: launch/wheelhouse.sh OUT [RECIPE ...]"
out=$1
shift
case $out in -*) refuse "the first argument is the folder to fill, but got the flag $out." ;; esac
for recipe in "$@"; do
  [ -f "$recipe" ] || refuse "there is no recipe $recipe; give files such as configs/train/node-400m.yaml."
done
python=${PYTHON:-python3}
repository=$(cd "$(dirname "$0")/.." && pwd)
"$python" -m pip --version > /dev/null 2>&1 || refuse "$python has no pip; set PYTHON to the path of a Python that has it."
mkdir -p "$out"
out=$(cd "$out" && pwd)
extras=${EXTRAS-gpu}
extras=${extras:+[$extras]}

# torch first: building deepspeed's wheel looks for it.
constraints=(-c "$repository/constraints.txt" --wheel-dir "$out/wheels" --find-links "$out/wheels")
"$python" -m pip wheel --quiet "${constraints[@]}" torch numpy pip setuptools
"$python" -m pip wheel --quiet "${constraints[@]}" "$repository$extras"
cp "$repository/constraints.txt" "$out/"

cat > "$out/install.sh" << END
#!/usr/bin/env bash
# Install xlstm-lm from this folder, without internet:  bash install.sh ENVIRONMENT
set -euo pipefail
[ \$# -eq 1 ] || { echo "install.sh: the folder of the environment is missing. usage: bash install.sh ENVIRONMENT" >&2; exit 2; }
here=\$(cd "\$(dirname "\$0")" && pwd)
"\${PYTHON:-python3}" -m venv "\$1"
"\$1/bin/python" -m pip install --quiet --no-index --find-links "\$here/wheels" -c "\$here/constraints.txt" "xlstm-lm$extras"
echo "Installed. To train:"
echo "  source \$1/bin/activate"
echo "  export TORCH_EXTENSIONS_DIR=\$here/torch_extensions HF_HUB_OFFLINE=1"
[ ! -f "\$here/offline.yaml" ] || echo "  launch/torchrun.sh RUN --config RECIPE --config \$here/offline.yaml"
END

# The kernels' library is named after the version of torch, so the wheels' own torch has to build it.
environment=$out/.environment
bash "$out/install.sh" "$environment" > /dev/null
TORCH_EXTENSIONS_DIR=$out/torch_extensions "$environment/bin/python" -c \
  'from xlstm_lm.ops.native import load_kernels; load_kernels()'
[ $# -eq 0 ] || "$environment/bin/python" "$repository/launch/fetch_for_offline.py" "$out" "$@"
rm -rf "$environment"
du -sh "$out"/*
