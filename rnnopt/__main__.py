"""``python -m rnnopt``, the same as the ``rnnopt`` command."""

import os
import sys

from rnnopt.cli.main import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # under torchrun, in one run of ten or so, a thread of torch's outlives the interpreter and
    # aborts, and the other processes, which may still be writing, are stopped for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
