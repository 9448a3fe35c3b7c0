"""Several concepts in one image, from the words alone: does each appear in its place?

Pairs of concepts of two classes and of one class, and triples, trained separately by the demo's
recipe, are drawn by prompts such as "a photo of <rex> and <tom> in a city": by plain merging, by
other methods (`_together/rivals/`, written from their papers), by `together=` and by `regions=`.
Prompts and seeds are the same. An image is right if each concept is recognised in its part, from
left to right. For comparison each concept is drawn alone, beside plain things of other classes.
A group of its own draws each concept beside a plain thing of another class, with both concepts
attached, and counts how often the plain thing is taken for one of them, or has the colour and
pattern of the named one. Errors are standard errors over images.

Images of 64 x 64 pixels are drawn by `assets/storybook`, wide ones by `assets/storybook-wide`,
which was trained on such; the concepts are trained for each.

`--tune` tries settings of other methods on other concepts, seeds and places; the constants of
`customize/stages/` were chosen on other seeds and places.

Missing concepts are trained, a minute each. Scores are stored by row and by concepts, so an
interrupted run resumes; they are named by the weights, the methods' code and their settings, so
that changed ones are measured anew; with `--resume` the file of `--json` keeps its other rows.
Seconds are those of one core, relative to the plain prompt with the same concepts attached,
alternating; medians.

    python scripts/bench/together.py --json scripts/bench/results/together.json
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any

import _common
import _workers
import torch
from _scorer import open_quietly
from _together import cast, drawing, trust, tuning
from _together.cast import (
    GROUPS,
    QUICK_GROUPS,
    SQUARE,
    WIDE,
    WIDE_BASE,
    Group,
    Kind,
    Names,
    Scene,
    Size,
)
from _together.rows import ALONE, BASE, LORA, ROWS, WORDS, WORDS_LORA, AloneRow, Row
from _together.scores import Hit, Scorer, rates, standard_error
from torch import Tensor

from customize.image_tensors import tensor_to_images
from customize.storybook.judges import load_judges

ROUNDS, QUICK_ROUNDS = 7, 2
QUICK_STEPS = 40
#: Jobs name a size by its index.
SIZES = (SQUARE, WIDE)
# Drawn scenes of each concept that the judges are measured on.
COUNT, QUICK_COUNT = 12, 1


class Bench:
    """The pipeline, its concepts and the scores of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.groups = QUICK_GROUPS if args.quick else GROUPS
        self.steps = QUICK_STEPS if args.quick else None
        self._pipes: dict[Size, Any] = {}

    # -- concepts -----------------------------------------------------------------------------

    def base(self, size: Size) -> Path:
        """The base that draws this size."""
        base: Path = self.args.base if size == SQUARE else self.args.wide_base
        return base

    def open(self, size: Size) -> Any:
        """The pipeline that draws this size, the same in every call."""
        if size not in self._pipes:
            self._pipes[size] = open_quietly(self.base(size))
            self._pipes[size].unet.to(memory_format=torch.channels_last)
        return self._pipes[size]

    def folders(self, size: Size, kind: Kind, names: Names) -> dict[str, Path]:
        find, base = cast.folder_of, self.base(size)
        return {n: find(self.args.folder, base, kind, n, self.steps) for n in names}

    def missing(self) -> list[str]:
        """The concepts to train, as jobs "size/kind/name"."""
        wanted = {
            f"{SIZES.index(self.groups[group].size)}/{ROWS[title].kind}/{name}"
            for group, title in self.cells()
            for names in self.groups[group].names
            for name in names
        }
        return sorted(job for job in wanted if not self._is_trained(*job.split("/")))

    def _is_trained(self, size: str, kind: Any, name: str) -> bool:
        (folder,) = self.folders(SIZES[int(size)], kind, (name,)).values()
        return (folder / "concept.json").exists()

    def learn(self, jobs: Sequence[str]) -> None:
        for job in jobs:
            number, kind, name = job.split("/")
            size, started = SIZES[int(number)], time.time()
            components = open_quietly(self.base(size)).components
            cast.learn(self.args.folder, self.base(size), kind, name, components, self.steps)
            print(f"learned {kind}/{name} for {size} in {time.time() - started:.0f} s", flush=True)

    # -- scores -------------------------------------------------------------------------------

    def cells(self) -> list[tuple[str, str]]:
        """Group and title of each row of the result."""
        chosen = self.args.groups or list(self.groups), self.args.rows or list(ROWS)
        return [
            (group, title)
            for group, title in itertools.product(*chosen)
            if group in self.groups
            and group in ROWS[title].groups
            # Two ordinary LoRAs are enough for a rough figure.
            and not (self.args.quick and ROWS[title].kind == "lora" and group != "mixed")
        ]

    def file(self, group: str, title: str, names: Names) -> Path:
        """The file of the scores of a row with these concepts."""
        row, scored = ROWS[title], self.groups[group]
        depends = hashlib.sha256(repr((asdict(scored) | {"names": ()}, row.merge)).encode())
        folders = self.folders(scored.size, row.kind, names).values()
        concepts = [folder / cast.WEIGHTS for folder in folders]
        models = (self.base(scored.size), self.args.judges)
        weights = [path for model in models for path in _workers.weights_of(model)]
        for path in [*weights, *concepts, *cast.SOURCES, *row.sources]:
            depends.update(_digest(path))
        name = f"{'-'.join(names)}-{depends.hexdigest()[:8]}.json"
        folder = self.args.folder / ("scores-quick" if self.args.quick else "scores")
        return folder / _workers.folder_name(group) / _workers.folder_name(title) / name

    def score(self, jobs: Sequence[str]) -> None:
        """Score rows by jobs "group/title/names"; finished ones are kept."""
        scorer = Scorer(load_judges(self.args.judges))
        for job in jobs:
            group, title, joined = job.split("/")
            names = tuple(joined.split("+"))
            path = self.file(group, title, names)
            if path.exists():
                continue
            hits: list[Hit] = []
            for scene, views in self.views(ROWS[title], self.groups[group], names):
                hits += scorer.hits(scene, views)
                if scene.numbers[0] < 2000 and not path.with_suffix(".png").exists():
                    save_line(views, path.with_suffix(".png"))
            _workers.keep(path, hits)
            shares = {key: round(value, 2) for key, value in rates(hits).items()}
            print(f"{group}, {title}, {joined}: {shares}", flush=True)

    def views(
        self, row: Row | AloneRow, group: Group, names: Names
    ) -> Iterator[tuple[Scene, list[Tensor]]]:
        """Draw all scenes of a group with these concepts."""
        pipe, folders = self.open(group.size), self.folders(group.size, row.kind, names)
        scenes = [scene for seed in group.seeds for scene in cast.scenes(group, names, seed)]
        if isinstance(row, AloneRow):
            for scene in scenes:
                yield scene, row.draw(pipe, folders, scene)
            return
        pipe.load_custom(*folders.values(), merge=row.merge)
        try:
            for scene in scenes:
                yield scene, [row.draw(pipe, *scene.call)] * len(names)
        finally:
            pipe.unload_custom()

    def run(self) -> list[dict[str, Any]]:
        """The measured rows, and with `--resume` the others of an earlier run, in a fixed order."""
        workers = _extra_flags(self.args)
        if missing := self.missing():
            _workers.share_out(self.args, "learn", missing, *workers)
        jobs = {
            f"{group}/{title}/{'+'.join(names)}": self.file(group, title, names)
            for group, title in self.cells()
            for names in self.groups[group].names
        }
        if left := [job for job, path in jobs.items() if not path.exists()]:
            _workers.share_out(self.args, "score", left, *workers)
        hits = {
            (group, title): [
                hit
                for names in self.groups[group].names
                for hit in json.loads(jobs[f"{group}/{title}/{'+'.join(names)}"].read_text())
            ]
            for group, title in self.cells()
        }
        if self.args.pictures is not None:
            self.save(self.args.pictures, jobs)
        rows = {(row["group"], row["drawn"]): row for row in _common.measured_rows(self.args)}
        for (group, title), found in hits.items():
            rows[group, title] = {"group": group, "drawn": title} | rates(found)
            rows[group, title]["pictures"] = len(found)
        for (group, title), row in rows.items():
            ceiling = rows.get((group, ALONE + (LORA if ROWS[title].kind == "lora" else "")))
            if ceiling is not None and ceiling["all"]:
                row["retention"] = row["all"] / ceiling["all"]
        return [rows[cell] for cell in itertools.product(GROUPS, ROWS) if cell in rows]

    def tune(self) -> list[dict[str, Any]]:
        """Try the settings of methods; see :mod:`_together.tuning`."""
        wanted = sorted(
            {n for g in cast.TUNING_GROUPS.values() for names in g.names for n in names}
        )
        jobs = [(str(SIZES.index(SQUARE)), "orthogonal", name) for name in wanted]
        self.learn(["/".join(job) for job in jobs if not self._is_trained(*job)])
        pipe, scorer = self.open(SQUARE), Scorer(load_judges(self.args.judges))
        rows = []
        for method in self.args.tune or tuning.METHODS:
            for row in tuning.tune(
                method,
                pipe,
                scorer,
                lambda names: [*self.folders(SQUARE, "orthogonal", names).values()],
            ):
                rows.append(row)
                print(row, flush=True)
        return rows

    def trust(self) -> dict[str, float]:
        scorer = Scorer(load_judges(self.args.judges))
        return trust.trust(self.open(SQUARE), scorer, QUICK_COUNT if self.args.quick else COUNT)

    # -- seconds ------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        """Title -> the time of a drawing, relative to a plain one."""
        group = next(iter(self.groups.values()))
        pipe = self.open(group.size)
        scene = cast.scenes(group, group.names[0], group.seeds[0])[0]
        results = {}
        for title, row in ROWS.items():
            if isinstance(row, AloneRow) or (self.args.rows and title not in self.args.rows):
                continue
            pipe.load_custom(
                *self.folders(group.size, row.kind, scene.names).values(),
                merge=row.merge,
            )
            timed: list[list[float]] = [[], []]
            for _ in range(QUICK_ROUNDS if self.args.quick else ROUNDS):
                for draw, taken in zip((drawing.draw, row.draw), timed, strict=True):
                    started = time.process_time()
                    draw(pipe, *scene.call)
                    taken.append(time.process_time() - started)
            pipe.unload_custom()
            results[title] = median(timed[1][1:]) / median(timed[0][1:])  # the first warms up
            print(f"{title}: {results[title]:.2f} times the seconds of plain", flush=True)
        return results

    # -- pictures -----------------------------------------------------------------------------

    def save(self, path: Path, jobs: Mapping[str, Path]) -> None:
        """Save one image per group, a line per row, from what the scoring has kept."""
        from PIL import Image

        for group in {group: None for group, _ in self.cells()}:
            lines = []
            for title in (title for where, title in self.cells() if where == group):
                kept = [
                    jobs[f"{group}/{title}/{'+'.join(names)}"].with_suffix(".png")
                    for names in self.groups[group].names
                ]
                lines.append([Image.open(each) for each in kept])
            cell, gap = lines[0][0], 2
            size = (cell.width + gap) * max(map(len, lines)), (cell.height + gap) * len(lines)
            sheet = Image.new("RGB", size, "white")
            for y, line in enumerate(lines):
                for x, image in enumerate(line):
                    sheet.paste(image, (x * (cell.width + gap), y * (cell.height + gap)))
            target = path.with_stem(f"{path.stem}-{_workers.folder_name(group)}")
            target.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(target)


def _digest(path: Path, known: dict[Path, bytes] = {}) -> bytes:  # noqa: B006 (a cache)
    if path not in known:
        known[path] = hashlib.sha256(path.read_bytes()).digest()
    return known[path]


def _extra_flags(args: argparse.Namespace) -> list[str]:
    flags = ["--wide-base", str(args.wide_base)]
    for name in ("groups", "rows"):
        if chosen := getattr(args, name):
            flags += [f"--{name}", *chosen]
    return flags


def save_line(views: Sequence[Tensor], path: Path) -> None:
    """Save the first image of a scene; of a ceiling, one for each concept, cut to its part."""
    width = views[0].shape[-1] // len(views)
    parts = [view[:1, ..., i * width : (i + 1) * width] for i, view in enumerate(views)]
    (image,) = tensor_to_images(torch.cat(parts, -1))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


# --- figures ----------------------------------------------------------------------------------


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The figures that the measured rows allow."""
    cells = {(row["group"], row["drawn"]): row for row in rows}
    figures: dict[str, float] = {}

    def add(name: str, groups: Sequence[str], title: str, column: str = "all") -> None:
        found = [cells[group, title] for group in groups if (group, title) in cells]
        if len(found) == len(groups):
            count = sum(row["pictures"] for row in found)
            share = sum(row[column] * row["pictures"] for row in found) / count
            figures[name] = share
            figures[f"{name}_error"] = standard_error(share, count)

    for group in ("mixed", "same"):
        add(f"words_both_right_{group}", [group], WORDS)
        add(f"plain_both_right_{group}", [group], "plain, fusion")
        add(f"alone_both_right_{group}", [group], ALONE)
        add(f"boxes_both_right_{group}", [group], "ours in boxes, fusion")
        add(f"wide_words_both_right_{group}", [f"{group}, wide"], WORDS)
        add(f"wide_regions_both_right_{group}", [f"{group}, wide"], "regions= in boxes, fusion")
        add(f"lora_both_right_{group}", [group], WORDS_LORA)
    add("wide_words_both_right", ["mixed, wide", "same, wide"], WORDS)
    add("triple_all_right", ["triples"], WORDS)
    add("triple_all_right_alone", ["triples"], ALONE)
    add("class_leak_words", ["beside a class"], WORDS, "leak")
    add("class_leak_plain", ["beside a class"], "plain, fusion", "leak")
    add("class_leak_base", ["beside a class"], BASE, "leak")
    # By default a prompt that names one concept is drawn plainly.
    for name, drawn in (("plain_class_leak", "words"), ("plain_class_leak_by_default", "plain")):
        if {f"class_leak_{drawn}", "class_leak_base"} <= figures.keys():
            figures[name] = figures[f"class_leak_{drawn}"] - figures["class_leak_base"]
    figures |= _margins(cells, WORDS, "margin_over_best_rival")
    return figures | _margins(cells, WORDS_LORA, "lora_margin_over_best_rival")


def _margins(
    cells: Mapping[tuple[str, str], Mapping[str, Any]], title: str, name: str
) -> dict[str, float]:
    """How much more is right by our way of drawing than by the best rival on these concepts."""
    margins = {}
    for group in ("mixed", "same", "mixed, wide", "same, wide", "triples"):
        rivals = [
            row["all"]
            for (where, drawn), row in cells.items()
            if where == group
            and ROWS[drawn].is_rival
            and (title == WORDS or ROWS[drawn].kind == ROWS[title].kind)
        ]
        if rivals and (group, title) in cells:
            margins[group] = cells[group, title]["all"] - max(rivals)
    figures = {
        f"{name}_{_workers.folder_name(group).replace('-', '_')}": margin
        for group, margin in margins.items()
    }
    if {"mixed", "same"} <= margins.keys():
        figures[name] = mean((margins["mixed"], margins["same"]))
    return figures


def main() -> None:
    parser = _common.parser(__doc__)
    _workers.add_arguments(parser, "runs/together", "learn", "score")
    parser.add_argument("--wide-base", type=Path, default=WIDE_BASE, help="base of wide images")
    parser.add_argument(
        "--groups",
        nargs="+",
        metavar="GROUP",
        choices=list(GROUPS),
        help=f"measure these only: {', '.join(map(repr, GROUPS))}",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="ROW",
        choices=list(ROWS),
        help=f"measure these only: {', '.join(map(repr, ROWS))}",
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FILE", help="write FILE-GROUP.png, a line for each row"
    )
    parser.add_argument(
        "--tune",
        nargs="*",
        metavar="METHOD",
        choices=list(tuning.METHODS),
        help="try the settings of these methods, and measure nothing else (default: all of "
        f"{', '.join(map(repr, tuning.METHODS))})",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of the file of --json that are not measured now",
    )
    args = parser.parse_args()
    bench = Bench(args)
    torch.set_num_threads(1)
    if args.learn is not None:
        bench.learn(args.learn)
    elif args.score is not None:
        bench.score(args.score)
    elif args.tune is not None:
        _common.report("together_tuning", args, bench.tune(), {})
    else:
        rows = bench.run()
        figures = figures_of(rows) | bench.trust()
        ratios = bench.seconds()
        for row in rows:
            if row["drawn"] in ratios:
                row["seconds_over_plain"] = ratios[row["drawn"]]
            if row["drawn"] == WORDS and "seconds_over_plain" in row:
                figures["seconds_over_plain"] = row["seconds_over_plain"]
        _common.report("together", args, rows, figures)


if __name__ == "__main__":
    main()
