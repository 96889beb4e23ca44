"""`python -m k2lite` is the command `k2lite`."""

import sys

from .cli import main

sys.exit(main())
