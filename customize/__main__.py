"""``python -m customize``: the same as the command ``customize``."""

import sys

from customize.cli import main

if __name__ == "__main__":
    sys.exit(main())
