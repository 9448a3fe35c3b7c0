"""Write the tables of scripts/bench/README.md from the result files in scripts/bench/results/.

    python scripts/make_bench_readme.py            # rewrite every table between its markers
    python scripts/make_bench_readme.py --check    # exit with 1 when a table differs, and print it

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; NAME is a key of
:data:`scripts.bench_tables.TABLES`. The text around the tables is written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.bench_tables import TABLES  # noqa: E402

README = ROOT / "scripts" / "bench" / "README.md"

_TABLE = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)


def render(text: str) -> str:
    """Return a README's text with every table between markers replaced by the current one.

    Raises:
        KeyError: a marker names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- table: {name} -->\n{TABLES[name]()}\n<!-- end of table -->"

    return _TABLE.sub(replace, text)


def main() -> int:
    """Rewrite the README, or compare with it; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 when a table differs"
    )
    arguments = parser.parse_args()
    text = README.read_text()
    rendered = render(text)
    if not arguments.check:
        README.write_text(rendered)
        return 0
    written = {match[1]: match[0] for match in _TABLE.finditer(text)}
    differing = [m[1] for m in _TABLE.finditer(rendered) if written[m[1]] != m[0]]
    for name in differing:
        print(f"{README.relative_to(ROOT)}: the table {name} differs from the results")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
