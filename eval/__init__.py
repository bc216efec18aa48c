"""Studies and benchmarks, each `python -m eval.NAME`."""

import signal
import sys

from xlstm_lm.base.import_path import keep_current_folder_out

if sys.argv[:1] == ["-m"]:  # Python is still looking for the module to run
    keep_current_folder_out()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `program` begins: no traceback while torch is imported
