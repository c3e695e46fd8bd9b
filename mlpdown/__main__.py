"""``python -m mlpdown``: the ``mlpdown`` command."""

import sys

from .cli import main

sys.exit(main())
