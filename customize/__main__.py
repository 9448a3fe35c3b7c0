"""``python -m customize``: the same as the command ``customize``."""

import sys

try:
    from customize.cli import main
except KeyboardInterrupt:
    sys.stderr.write("interrupted\n")
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
