"""Rewriting: the seconds that it adds to a picture.

Time passes between a call and its first use of the text encoder; the median with `rewrite=True`
minus that without is what rewriting adds, with everything that it checks. Calls alternate. Cold:
the language model writes the rewriting; warm: it was kept from an earlier call. A picture has 25
steps, and its seconds are those of one picture alone, or of one of sixteen.

    python scripts/bench/rewrite_cost.py --json scripts/bench/results/rewrite_cost.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import _common
from _scorer import open_quietly

import customize
from customize.evaluation.storybook_rates import GUIDANCE, STEPS
from customize.storybook.bundled_assets import assets_folder
from storybook_rewriter.study_prompts import tuning_prompts

COUNTS = (1, 16)
REPEATS, QUICK_REPEATS = 7, 3


class Clock:
    """Seconds from a call to its first use of the text encoder, and to its end."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.reached: float | None = None
        pipe.text_encoder.register_forward_pre_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.reached = self.reached or time.perf_counter()

    def call(self, prompts: Sequence[str], **arguments: Any) -> tuple[float, float]:
        self.reached = None
        started = time.perf_counter()
        self.pipe(
            list(prompts),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="np",
            **arguments,
        )
        ended = time.perf_counter()
        assert self.reached is not None
        return self.reached - started, ended - started


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, source in _common.rewriters(args, "miniature").items():
        pipe = open_quietly(args.base)
        rewriter = customize.Rewriter.from_pretrained(source, max_new_tokens=64)
        pipe.load_custom(rewriter)
        clock = Clock(pipe)
        for count in COUNTS:
            prompts = [prompt.text for prompt in tuning_prompts(count)]
            seconds: dict[str, list[float]] = {"plain": [], "cold": [], "warm": [], "picture": []}
            clock.call(prompts)  # compiles and allocates
            for _ in range(QUICK_REPEATS if args.quick else REPEATS):
                before, whole = clock.call(prompts)
                seconds["plain"].append(before)
                seconds["picture"].append(whole / count)
                rewriter.forget()
                for how in ("cold", "warm"):
                    seconds[how].append(clock.call(prompts, rewrite=True)[0])
            picture = median(seconds["picture"])
            for how in ("cold", "warm"):
                added = (median(seconds[how]) - median(seconds["plain"])) / count
                rows.append(
                    {
                        "model": name,
                        "prompts": count,
                        "cache": how,
                        "seconds_added": added,
                        "of_a_picture": added / picture,
                        "picture_seconds": picture,
                    }
                )
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = _common.parser(__doc__)
    _common.add_rewriters(parser)
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    args = parser.parse_args()
    rows = measure(args)
    figures = {
        f"{row['cache']}_cost_{row['prompts']}_{row['model'].lower()}": row["of_a_picture"]
        for row in rows
    }
    _common.report("rewrite_cost", args, rows, figures)


if __name__ == "__main__":
    main()
