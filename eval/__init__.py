"""Studies and benchmarks, each `python -m eval.NAME`."""

import sys

from xlstm_lm.base.import_path import keep_current_folder_out

if sys.argv[:1] == ["-m"]:  # Python is still looking for the module to run
    keep_current_folder_out()
