"""Evolve prompts by rewards: `python scripts/evolve_prompts.py --base BASE --prompts FILE ...`.

The flags are those of `customize rewriter evolve`.
"""

from __future__ import annotations

import sys

from customize.cli import main

if __name__ == "__main__":
    sys.exit(main(["rewriter", "evolve", *sys.argv[1:]]))
