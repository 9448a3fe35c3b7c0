"""Near names where an unknown one was given: of settings, flags, concepts, methods and all else."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

#: What other trainers and diffusers call it -> what it is called here.
SYNONYMS = {
    "bs": "batch_size",
    "caption_dropout_rate": "caption_dropout",
    "center_crop": "resolution",
    "checkpointing_steps": "checkpoint_every",
    "checkpoints_total_limit": "keep_checkpoints",
    "class_data_dir": "prior_images",
    "class_prompt": "prior_prompt",
    "cfg": "guidance",
    "cfg_scale": "guidance",
    "conv_dim": "rank",
    "data": "images",
    "dim": "rank",
    "enable_bucket": "buckets",
    "epoch": "steps",
    "epochs": "steps",
    "fp16": "float16",
    "fp32": "float32",
    "flip_aug": "flip",
    "folder": "output",
    "guidance_scale": "guidance",
    "half": "float16",
    "initializer_token": "class_word",
    "instance_data_dir": "images",
    "iterations": "steps",
    "logging_dir": "output",
    "lora_alpha": "alpha",
    "lora_rank": "rank",
    "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_steps",
    "max_train_epochs": "steps",
    "max_train_steps": "steps",
    "method": "merge",
    "model": "base",
    "n_iter": "count",
    "network_alpha": "alpha",
    "network_dim": "rank",
    "neg": "negative",
    "num_class_images": "prior_count",
    "num_images": "count",
    "num_inference_steps": "steps",
    "num_train_epochs": "steps",
    "num_vectors": "num_tokens",
    "out": "output",
    "outdir": "output",
    "output_dir": "output",
    "placeholder_token": "trigger",
    "precision": "mixed_precision",
    "pretrained_model_name_or_path": "base",
    "prior_loss_weight": "prior_weight",
    "random_flip": "flip",
    "report_to": "tracker",
    "resume_from_checkpoint": "resume",
    "save_every_n_steps": "checkpoint_every",
    "snr_gamma": "min_snr_gamma",
    "text_encoder_lr": "text_learning_rate",
    "timestep_sampling": "timestep_density",
    "token": "trigger",
    "train_batch_size": "batch_size",
    "train_data_dir": "images",
    "unet_lr": "learning_rate",
    "validation_epochs": "validation_every",
    "validation_prompt": "validation_prompts",
    "weighting_scheme": "timestep_density",
}

_CUTOFF = 0.6
_MAX_LENGTH = 200


def find_near_names(name: object, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that are likely to be meant, the likeliest first.

    A name counts as near that another program uses for it, whose words begin with its letters
    (``lr``, ``learning_rate``; ``bf16``, ``bfloat16``), that it begins or ends, or that is spelled
    much like it. Case, and whether words are joined by ``-`` or ``_``, do not matter.

    Args:
        name: as it was given; anything but a short text has none that is near.
        known: what there is.
    """
    names = list(dict.fromkeys(known))
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_LENGTH:
        return []
    given = _plain(name)
    by_plain: dict[str, str] = {}
    for each in names:
        by_plain.setdefault(_plain(each), each)
    elsewhere = _plain(SYNONYMS.get(given.replace(" ", "_"), ""))
    if given in by_plain:
        return [by_plain[given]]
    found = [elsewhere] if elsewhere in by_plain else []
    found += [plain for plain in by_plain if _abbreviates(given.replace(" ", ""), plain)]
    found += difflib.get_close_matches(given, by_plain, n=most, cutoff=_CUTOFF)
    found += sorted((plain for plain in by_plain if _contains(given, plain)), key=len)
    return [by_plain[plain] for plain in dict.fromkeys(found)][:most]


def did_you_mean(name: object, known: Collection[str], most: int = 3) -> str:
    """``"did you mean a or b?"``, or nothing where no known name is near."""
    found = find_near_names(name, known, most)
    return f"did you mean {' or '.join(found)}?" if found else ""


def suggest_names(name: object, known: Collection[str], otherwise: str = "") -> str:
    """What to do where an unknown name was given: the near ones, and all there are, at most 40.

    Args:
        otherwise: what to do where there is none at all.
    """
    if not known:
        return otherwise
    names = list(known)
    listed = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    hint = did_you_mean(name, names)
    return f"{hint} If not, choose from {listed}" if hint else f"choose from {listed}"


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s]+", " ", name.lower().strip("<>-_ "))


def _abbreviates(short: str, name: str) -> bool:
    """Whether a text is the beginnings of a name's words: lr, bs, wd, tlr."""
    words = name.split()
    if len(short) < 2 or len(words) < 2:
        return False

    def taken(rest: str, number: int) -> bool:
        if number == len(words):
            return not rest
        word = words[number]
        return any(
            rest[:count] == word[:count] and taken(rest[count:], number + 1)
            for count in range(1, min(len(rest), len(word)) + 1)
        )

    return taken(short, 0)


def _contains(given: str, name: str) -> bool:
    """Whether one has all the words of the other: class and class word."""
    a, b = set(given.split()), set(name.split())
    return bool(a) and bool(b) and (a <= b or b <= a)


def find_near_paths(path: object, most: int = 3) -> list[str]:
    """Files and folders that are there and are written much like a path that is not.

    Args:
        path: relative to the current folder, or absolute.
    """
    try:
        wanted = Path(str(path)).expanduser()
        missing = next(p for p in (*reversed(wanted.parents), wanted) if not os.path.lexists(p))
        folder, rest = missing.parent, wanted.relative_to(missing)
        with os.scandir(folder) as inside:
            names = sorted(each.name for each in inside if not each.name.startswith("."))[:10_000]
        by_stem = {Path(name).stem: name for name in reversed(names)} | {n: n for n in names}
        found = [by_stem[name] for name in find_near_names(missing.stem, by_stem, most)]
        found += [by_stem[name] for name in find_near_names(missing.name, by_stem, most)]
        there = [folder / name / rest for name in dict.fromkeys(found)]
        return [str(each) for each in there if os.path.lexists(each)][:most]
    except (OSError, ValueError, RuntimeError, StopIteration):
        return []


def suggest_paths(path: object, otherwise: str) -> str:
    """What to do where a path is not there: name one that is near, else something."""
    found = find_near_paths(path)
    return f"did you mean {' or '.join(found)}? If not, {otherwise}" if found else otherwise
