"""``python -m switchkit`` is the program ``switchkit``."""

import sys

from switchkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
