"""Do the claims that are measured in the storybook hold on artwork that was not made for them?

Each claim is a file of `_claims/`, which says what it measures: pairs from words, class
preservation, leaked content, and a hand learned from six stickers. Merging is measured by
`merge_identity.py --world stickers`, whose concepts the pairs use, and own drawings by
`worlds.py`. References have no row: the bundled reference model is one of the storybook's base.

Trained concepts and scores are stored in `--folder`; an interrupted run resumes. Scores are named
by the base, the judges and the code of the claims. The artwork is installed by `make stickers`.

    python scripts/bench/sticker_claims.py --json scripts/bench/results/sticker_claims.json
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
import _workers
import torch
from _claims import CLAIMS
from _claims.claim import Bench, Training
from _leaky import save
from _worlds.bench_world import WORLDS
from _worlds.sticker_concepts import installed


def trainings(bench: Bench, claims: Sequence[str]) -> dict[str, Training]:
    """The trainings of all claims by their folders; some claims share them."""
    return {
        str(training.config.output): training
        for claim in claims
        for training in CLAIMS[claim].trainings(bench)
    }


def learn(bench: Bench, jobs: Sequence[str]) -> None:
    """Train concepts; finished ones are kept."""
    from customize.training.recipe import train

    known = trainings(bench, list(CLAIMS))
    for job in jobs:
        started, training = time.time(), known[job]
        training.write(training.config.images)
        train(training.config, progress=False)
        print(f"learned {job} in {time.time() - started:.0f} s", flush=True)


def score_file(bench: Bench, job: str) -> Path:
    """The file of the scores of a job, "claim/way"."""
    depends = hashlib.sha256(str(bench.quick).encode())
    sources = sorted(Path(__file__).with_name("_claims").glob("*.py"))
    models = (*_workers.weights_of(bench.base), *_workers.weights_of(bench.args.judges))
    for path in (*sources, *models):
        depends.update(path.read_bytes())
    folder: Path = bench.args.folder / f"scores-{depends.hexdigest()[:8]}"
    return folder / f"{_workers.folder_name(job)}.json"


def score(bench: Bench, jobs: Sequence[str]) -> None:
    """Score ways, and save samples of their images; finished ones are kept."""
    for job in jobs:
        path = score_file(bench, job)
        if path.exists():
            continue
        started = time.time()
        claim, _, way = job.partition("/")
        rates, samples = CLAIMS[claim].score(bench, way)
        save(samples, path.with_suffix(".png"))
        _workers.keep(path, rates)
        text = " ".join(f"{key} {value:.3f}" for key, value in rates.items())
        print(f"{job}: {text} ({time.time() - started:.0f} s)", flush=True)


def run(bench: Bench, claims: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    more = ("--merging", str(bench.args.merging), "--worlds", str(bench.args.worlds))
    missing = [
        folder
        for folder in trainings(bench, claims)
        if not (Path(folder) / "concept.json").exists()
    ]
    if missing:
        _workers.share_out(bench.args, "learn", missing, *more)
    jobs = [f"{claim}/{way}" for claim in claims for way in CLAIMS[claim].ways]
    _workers.share_out(bench.args, "score", jobs, *more)
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for claim in claims:
        rates = {
            way: json.loads(score_file(bench, f"{claim}/{way}").read_text())
            for way in CLAIMS[claim].ways
        }
        rows += [{"claim": claim, "way": way} | rate for way, rate in rates.items()]
        found = CLAIMS[claim].figures(rates)
        figures |= {f"stickers_{name}": value for name, value in found.items()}
    return rows, figures


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/sticker_claims", "learn", "score")
    parser.set_defaults(base=WORLDS["stickers"].base, judges=WORLDS["stickers"].judges)
    parser.add_argument(
        "--merging",
        type=Path,
        default=Path("runs/merge_identity_stickers"),
        help="folder of merge_identity.py --world stickers",
    )
    parser.add_argument(
        "--worlds", type=Path, default=Path("runs/worlds"), help="folder of worlds.py"
    )
    parser.add_argument(
        "--claims", nargs="+", choices=list(CLAIMS), default=list(CLAIMS), help="measure these only"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args, *installed())
    if args.learn is not None:
        learn(bench, args.learn)
    elif args.score is not None:
        score(bench, args.score)
    else:
        _common.report("sticker_claims", args, *run(bench, args.claims))


if __name__ == "__main__":
    main()
