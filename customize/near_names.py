"""Suggestions of similar names for unknown settings, flags, concepts, methods and paths."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

#: Names in other trainers and in diffusers -> names in this package.
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


def find_near_names(name: object, known: Iterable[str], limit: int = 3) -> list[str]:
    """Find the known names that are most similar to an unknown one, best match first.

    A known name is similar if another program uses the unknown name for it, if it is abbreviated
    by it (``lr`` for ``learning_rate``, ``bf16`` for ``bfloat16``), if one has all words of the
    other, or if their spelling is close. Case and the separators ``-`` and ``_`` are ignored.

    Args:
        name: The unknown name; a value other than a short text has no similar names.
        known: All known names.
        limit: Maximum number of names returned.
    """
    names = list(dict.fromkeys(known))
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_LENGTH:
        return []
    requested = _normalize(name)
    by_normalized: dict[str, str] = {}
    for known_name in names:
        by_normalized.setdefault(_normalize(known_name), known_name)
    synonym = _normalize(SYNONYMS.get(requested.replace(" ", "_"), ""))
    if requested in by_normalized:
        return [by_normalized[requested]]
    matches = [synonym] if synonym in by_normalized else []
    matches += [n for n in by_normalized if _is_abbreviation(requested.replace(" ", ""), n)]
    matches += difflib.get_close_matches(requested, by_normalized, n=limit, cutoff=_CUTOFF)
    matches += sorted((n for n in by_normalized if _has_same_words(requested, n)), key=len)
    return [by_normalized[match] for match in dict.fromkeys(matches)][:limit]


def did_you_mean(name: object, known: Collection[str], limit: int = 3) -> str:
    """Return ``"did you mean a or b?"``, or an empty string if no known name is similar."""
    names = find_near_names(name, known, limit)
    return f"did you mean {' or '.join(names)}?" if names else ""


def suggest_names(name: object, known: Collection[str], otherwise: str = "") -> str:
    """Return the fix for an unknown name: similar names, and up to 40 of all known names.

    Args:
        name: The unknown name.
        known: All known names.
        otherwise: The fix where no names are known.
    """
    if not known:
        return otherwise
    names = list(known)
    listed = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    hint = did_you_mean(name, names)
    if hint and len(names) == 1:
        return hint
    return f"{hint} If not, choose from {listed}" if hint else f"choose from {listed}"


def _normalize(name: str) -> str:
    return re.sub(r"[-_.\s]+", " ", name.lower().strip("<>-_ "))


def _is_abbreviation(short: str, name: str) -> bool:
    """Whether a text consists of the first letters of a name's words: lr, bs, wd, tlr."""
    words = name.split()
    if len(short) < 2 or len(words) < 2:
        return False

    def matches(letters: str, index: int) -> bool:
        if index == len(words):
            return not letters
        word = words[index]
        return any(
            letters[:count] == word[:count] and matches(letters[count:], index + 1)
            for count in range(1, min(len(letters), len(word)) + 1)
        )

    return matches(short, 0)


def _has_same_words(requested: str, name: str) -> bool:
    """Whether one name has all words of the other: class and class word."""
    a, b = set(requested.split()), set(name.split())
    return bool(a) and bool(b) and (a <= b or b <= a)


def find_near_paths(path: object, limit: int = 3) -> list[str]:
    """Find existing files and folders with names similar to a missing path.

    Args:
        path: The missing path, absolute or relative to the current folder.
        limit: Maximum number of paths returned.
    """
    try:
        full = Path(str(path)).expanduser()
        missing = next(p for p in (*reversed(full.parents), full) if not os.path.lexists(p))
        folder, remainder = missing.parent, full.relative_to(missing)
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith("."))[:10_000]
        by_stem = {Path(name).stem: name for name in reversed(names)} | {n: n for n in names}
        matches = [by_stem[name] for name in find_near_names(missing.stem, by_stem, limit)]
        matches += [by_stem[name] for name in find_near_names(missing.name, by_stem, limit)]
        candidates = [folder / name / remainder for name in dict.fromkeys(matches)]
        return [str(candidate) for candidate in candidates if os.path.lexists(candidate)][:limit]
    except (OSError, ValueError, RuntimeError, StopIteration):
        return []


def suggest_paths(path: object, otherwise: str) -> str:
    """Return the fix for a missing path: similar existing paths and ``otherwise``."""
    paths = find_near_paths(path)
    return f"did you mean {' or '.join(paths)}? If not, {otherwise}" if paths else otherwise
