"""Rewriting: do pictures of rewritten prompts show more of what users ask for?

204 held-out prompts of six kinds (customize.storybook.user_prompts) with two seeds each: their
combinations and a third of the words that the base never saw were in no training of a rewriter. The
judges never were a reward; rewriters were taught with a CLIP, whose score is a column.

Rows: the user's prompt; a speller with a list of synonyms; each language model of `--rewriter`,
greedy, with the checks of the product; the best of four of `--best-of`; and the caption that a
writer who knows the base's grammar would give, the ceiling.

- shown: share of what a prompt asks for that the pictures show, with what it excludes absent, and
  its standard error over prompts; then by kind of prompt. whole: share of pictures with all of it.
- kept: share of texts that keep triggers and exclusions, of prompts that have them. kept by the
  model: the same of its first answers. own: share of prompts whose rewriting was refused or
  repaired. added: things a text that the prompt does not ask for. seconds: of a rewriting, with all
  prompts in one call.

The file of `--json` is written after every row, and `--resume` keeps its rows.

    python scripts/bench/rewriting.py --rewriter "bundled miniature=assets/rewriter" --json FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import _common
import torch
from _rewritings import Pictures, keeps, rate_pictures, rate_texts
from _scorer import open_quietly

import customize
from customize.demo.experiment import TRAINING
from customize.errors import EndpointError
from customize.evaluation.rewards import load_reward
from customize.image_tensors import images_to_tensor
from customize.rewriting.clean_answer import clean_answer
from customize.rewriting.language_model import (
    AfterUse,
    Chat,
    Completion,
    LanguageModel,
    Message,
    Sampling,
)
from customize.storybook.bundled_assets import assets_folder
from customize.storybook.example_concepts import bundled_concept
from customize.storybook.judges import load_judges
from customize.storybook.user_prompts import KINDS, UserPrompt
from storybook_rewriter.study_prompts import held_out_prompts
from storybook_rewriter.word_rules import apply_word_rules

PROMPTS, SEEDS = 204, 2
QUICK_PROMPTS = 24
TRIGGER = "<rex>"
CANDIDATES = 4
USER, CEILING = "user's prompt", "caption of a writer who knows the grammar"
RULES, BEST_OF = "speller and synonyms", "{}, best of 4"

Row = dict[str, Any]


class FirstAnswers:
    """A language model that notes the first answer to each chat of one user's message."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.name, self.digest = model, model.name, model.digest
        self.can_reload = model.can_reload
        self.answers: dict[tuple[Any, ...], str] = {}

    def complete(
        self, chats: Sequence[Chat], sampling: Sampling
    ) -> Sequence[Completion | EndpointError]:
        found = self.model.complete(chats, sampling)
        for chat, answer in zip(chats, found, strict=True):
            is_first = all(message.role != "assistant" for message in chat.messages)
            if is_first and isinstance(answer, Completion):
                self.answers.setdefault(chat.messages, clean_answer(answer.text))
        return found

    def check_length(self, messages: Sequence[Message], max_new_tokens: int) -> None:
        self.model.check_length(messages, max_new_tokens)

    def use(self, device: object = None, after: AfterUse = "keep") -> AbstractContextManager[None]:
        return self.model.use(device, after)


def open_pictures(args: argparse.Namespace) -> Pictures:
    """The base with the concept of the trigger, the judges and the reward."""
    concept = bundled_concept(TRIGGER.strip("<>"))
    made = customize.train(
        base=str(args.base),
        images=assets_folder() / "concepts" / concept.name,
        output=args.folder / concept.name,
        name=concept.name,
        class_word=concept.identity.kind,
        progress=False,
        record_inputs=False,
        **TRAINING | {"checkpoint_every": 0},
    )
    pipe = open_quietly(args.base).load_custom(made)
    pipe.unet.to(memory_format=torch.channels_last)
    judges = load_judges(args.judges)
    reward = None if args.reward is None else load_reward("clip", str(args.reward))
    prototype = judges.prototype(images_to_tensor(concept.images()))
    return Pictures(pipe, judges, prototype, reward, args.folder / "pictures")


def rewrite(source: str, prompts: Sequence[UserPrompt]) -> tuple[list[list[str]], Row]:
    """Texts of a language model for each seed, the same ones, and figures of its answers."""
    rewriter = customize.Rewriter.from_pretrained(source, max_new_tokens=64)
    noted = FirstAnswers(rewriter.model)
    rewriter.model = noted
    started = time.perf_counter()
    found = rewriter.rewrite([prompt.text for prompt in prompts])
    seconds = time.perf_counter() - started
    asked = [rewriter.instructions.messages(prompt.text) for prompt in prompts]
    answers = [noted.answers[messages] for messages in asked]
    strict = [
        keeps(prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if prompt.kind == KINDS[-1]
    ]
    texts = [each.text for each in found]
    return [texts] * SEEDS, {
        "kept_by_the_model": sum(strict) / len(strict),
        "own": sum(bool(each.note) for each in found) / len(found),
        "seconds": seconds / len(found),
    }


def best_of(
    source: str, pictures: Pictures, prompts: Sequence[UserPrompt]
) -> tuple[list[list[str]], Row]:
    """For each seed the text, of four rewritings and the prompt, with the highest reward."""
    rewriter = customize.Rewriter.from_pretrained(source, temperature=1.0, max_new_tokens=64)
    users = [prompt.text for prompt in prompts]
    found = [each.text for each in rewriter.rewrite(users, n=CANDIDATES)]
    pools = [[user, *found[CANDIDATES * k : CANDIDATES * (k + 1)]] for k, user in enumerate(users)]
    rows = []
    for seed in range(SEEDS):
        jobs = [(text, 1000 * seed + k) for k, pool in enumerate(pools) for text in pool]
        pictures.draw(jobs)
        scores = pictures.rewards(jobs, [user for user in users for _ in range(CANDIDATES + 1)])
        width = CANDIDATES + 1
        rows.append(
            [
                max(zip(scores[k * width :][:width], pool, strict=True))[1]
                for k, pool in enumerate(pools)
            ]
        )
    return rows, {}


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows; those of an earlier run are kept with `--resume`."""
    prompts = held_out_prompts(QUICK_PROMPTS if args.quick else PROMPTS, TRIGGER)
    pictures = open_pictures(args)
    sources = _common.rewriters(args, "bundled miniature")
    best = {BEST_OF.format(name): sources[name] for name in args.best_of}
    calls: dict[str, Callable[[], tuple[list[list[str]], Row]]] = {
        USER: lambda: ([[prompt.text for prompt in prompts]] * SEEDS, {}),
        RULES: lambda: ([[apply_word_rules(prompt.text) for prompt in prompts]] * SEEDS, {}),
        **{name: partial(rewrite, source, prompts) for name, source in sources.items()},
        **{name: partial(best_of, source, pictures, prompts) for name, source in best.items()},
        CEILING: lambda: ([[prompt.caption for prompt in prompts]] * SEEDS, {}),
    }
    kept = {row["drawn from"]: row for row in _common.measured_rows(args)}
    rows: list[Row] = []
    for name, call in calls.items():
        if name in kept:
            rows.append(kept[name])
            continue
        texts, more = call()
        row = {"drawn from": name} | rate_pictures(pictures, prompts, texts)
        rows.append(row | rate_texts(prompts, texts) | more)
        print(rows[-1], flush=True)
        if args.texts is not None:
            save_texts(args.texts, name, prompts, texts[0])
        _common.write_result("rewriting", args, rows, figures(rows))
    return rows


def save_texts(file: Path, name: str, prompts: Sequence[UserPrompt], texts: Sequence[str]) -> None:
    """Append the texts of a row to a .jsonl file."""
    with file.open("a") as lines:
        for prompt, text in zip(prompts, texts, strict=True):
            lines.write(json.dumps({"row": name, "prompt": prompt.text, "text": text}) + "\n")


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of each model that has a row of its second DPO, as far as rows are there."""
    by_name = {row["drawn from"]: row for row in rows}
    result: dict[str, float] = {}
    for name, row in by_name.items():
        model, _, stage = name.rpartition(" ")
        if stage != "dpo-2" or USER not in by_name:
            continue
        user, key = by_name[USER], model.lower()
        result[f"kept_terms_{key}"] = row["kept"]
        result[f"kept_terms_by_the_model_{key}"] = row["kept_by_the_model"]
        result[f"added_things_{key}"] = row["added"]
        result[f"judge_gain_on_unrewarded_{key}"] = row["shown"] - user["shown"]
        if CEILING in by_name:
            gap = by_name[CEILING]["shown"] - user["shown"]
            result[f"dpo2_gap_closed_{key}"] = (row["shown"] - user["shown"]) / gap
        zero_shot = by_name.get(f"{model} zero-shot")
        if zero_shot is not None:
            result[f"dpo2_over_zero_shot_{key}"] = row["shown"] - zero_shot["shown"]
    return result


def main() -> None:
    parser = _common.parser(__doc__)
    _common.add_rewriters(parser)
    parser.add_argument(
        "--best-of", action="append", default=[], metavar="NAME", help="a row of --rewriter"
    )
    parser.add_argument("--reward", type=Path, help="CLIP that rewriters were taught with")
    parser.add_argument("--base", type=Path, default=assets_folder() / "storybook")
    parser.add_argument("--judges", type=Path, default=assets_folder() / "judges")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/bench-rewriting"),
        help="keeps the concept and the pictures; name another one for another base",
    )
    parser.add_argument("--texts", type=Path, help="append the texts of all rows to this .jsonl")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the file of --json has"
    )
    args = parser.parse_args()
    rows = measure(args)
    _common.report("rewriting", args, rows, figures(rows))


if __name__ == "__main__":
    main()
