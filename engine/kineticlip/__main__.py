"""`python -m kineticlip` is the console script."""

import sys

from kineticlip.cli import main

sys.exit(main())
