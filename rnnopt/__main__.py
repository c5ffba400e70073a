"""``python -m rnnopt``, the same as the ``rnnopt`` command."""

import sys

from rnnopt.cli import main

sys.exit(main())
