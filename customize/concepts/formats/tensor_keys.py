"""What the keys of a LoRA file say: which layer is meant, and which part of its update."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from customize.errors import ConceptError

#: Changes of a bias or a norm -> the same; see vectors.py.
VECTOR_KEY_SUFFIXES: dict[str, tuple[str, ...]] = {
    "diff_b": (".diff_b",),
    "w_norm": (".w_norm",),
    "b_norm": (".b_norm",),
    "down_bias": (".lora_A.bias", ".lora_A.*.bias", ".lora_down.bias"),
    "up_bias": (".lora_B.bias", ".lora_B.*.bias", ".lora_up.bias"),
    "bias": (".base_layer.bias", ".bias"),
    "norm_scale": (".scale",),
}

#: sd-scripts' OFT of FLUX has blocks for each part of a layer that diffusers splits.
OFT_SPLITS = ("oft_blocks_0", "oft_blocks_1", "oft_blocks_2", "oft_blocks_3")

#: Part of an update -> how files end the keys that hold it; `*` stands for a peft adapter's name.
_KEY_SUFFIXES: dict[str, tuple[str, ...]] = {
    "down": (
        ".lora_A.weight",
        ".lora_A.*.weight",
        ".lora_down.weight",
        ".lora.down.weight",
        "_lora.down.weight",
        ".lora_linear_layer.down.weight",
        ".down.weight",
    ),
    "up": (
        ".lora_B.weight",
        ".lora_B.*.weight",
        ".lora_up.weight",
        ".lora.up.weight",
        "_lora.up.weight",
        ".lora_linear_layer.up.weight",
        ".up.weight",
    ),
    "mid": (".lora_mid.weight",),
    "alpha": (".alpha",),
    "dora_scale": (".dora_scale",),
    "magnitude": (
        ".lora_magnitude_vector",
        ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.*.weight",
        ".lora_magnitude_vector.*",
    ),
    "diff": (".diff",),
    "rescale": (".rescale",),
    "oft_blocks": (".oft_blocks",),
    **{part: (f".oft_blocks.{part[-1]}",) for part in OFT_SPLITS},
    "oft_diag": (".oft_diag",),
    "oft_R": (".oft_R.weight", ".oft_R.*.weight"),
    "oft_scaled": (".oft_R.scaled_oft",),
    "boft_R": (".boft_R", ".boft_R.*"),
    "boft_s": (".boft_s", ".boft_s.*"),
    **{name: (f".{name}",) for part in "12" for name in (f"hada_w{part}_a", f"hada_w{part}_b")},
    **{name: (f".{name}",) for name in ("hada_t1", "hada_t2", "lokr_t2")},
    **{
        name: (f".{name}",)
        for part in "12"
        for name in (f"lokr_w{part}", f"lokr_w{part}_a", f"lokr_w{part}_b")
    },
    **VECTOR_KEY_SUFFIXES,
}


def _pattern(endings: Iterable[str]) -> str:
    return "|".join(re.escape(ending).replace(r"\*", r"[A-Za-z0-9_-]+") for ending in endings)


_KEY = re.compile(
    # Every ending begins with one of these; to look for them first is several times as fast.
    "(?P<path>.+?)(?=[._])(?:"
    + "|".join(f"(?P<{part}>{_pattern(endings)})" for part, endings in _KEY_SUFFIXES.items())
    + ")"
)

#: What some of peft's adapters keep of their training, which does nothing when they draw: VeLoRA's
#: projections for the backward pass, and MonteCLoRA's noise.
_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")

#: A vector by such a key is the weight of a norm that was trained itself, as by peft's
#: modules_to_save.
_TRAINED_NORM = re.compile(r"(?P<path>(?!.*\.lora_).+)\.weight")

#: Parts with which nothing is known to do, and what they are.
_UNSUPPORTED = {
    "norm in place of the base's": re.compile(r".+\.set_weight"),
    "bundled embedding": re.compile(r"bundle_emb\..+"),
    "update of older peft's OFT": re.compile(r".+\.oft_r(\..+)?"),
    "update of IA3 or GLoRA": re.compile(r".+\.(on_input|[ab][12]\.weight)"),
    "row of a text encoder's embeddings": re.compile(r".+\.trainable_tokens_(delta|original).*"),
    "copy of a whole module's weight": re.compile(r"(?!.*\.lora_).+(?<!norm)\.weight"),
}


@dataclass(frozen=True)
class TensorGroup:
    """All keys of one layer, as the file names it.

    Attributes:
        path: what the keys begin with, without what names the part.
        parts: part -> tensor.
        keys: part -> the whole key.
    """

    path: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = (f"{part} {tuple(tensor.shape)}" for part, tensor in self.parts.items())
        return f"Group({self.path}: {', '.join(shapes)})"


def group_by_layer(tensors: Mapping[str, Tensor], where: object) -> list[TensorGroup]:
    """The file's keys by the layer that they are on, in the order of their names.

    Raises:
        ConceptError: a key is none that is known here, or says the same as another.
    """
    groups: dict[str, TensorGroup] = {}
    unknown = []
    for key in sorted(tensors):
        path, part = parse_key(key)
        if not part and tensors[key].ndim == 1 and (trained := _TRAINED_NORM.fullmatch(key)):
            path, part = trained["path"], "norm_scale"
        if not part and _TRAINING_ONLY.fullmatch(key):
            continue
        if not part:
            unknown.append(key)
            continue
        group = groups.setdefault(path, TensorGroup(path))
        if part in group.parts:
            raise ConceptError(
                f"the keys {group.keys[part]} and {key} hold the same part of one layer",
                where=where,
                fix="get the file from its maker again, or keep one adapter in it",
            )
        group.parts[part] = tensors[key]
        group.keys[part] = key
    if unknown:
        kinds = {kind for kind, known in _UNSUPPORTED.items() if any(map(known.fullmatch, unknown))}
        what = f" ({', each a '.join(sorted(kinds))})" if kinds else ""
        raise ConceptError(
            f"{len(unknown)} of {len(tensors)} keys are not read here{what}, and nothing is "
            f"loaded by half: {join_names(unknown)}",
            where=where,
            fix=_suggest_fix(kinds, unknown),
        )
    return list(groups.values())


def join_names(names: Iterable[str], most: int = 10) -> str:
    """Names one after another, cut short where they are many."""
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


@functools.lru_cache(maxsize=2**14)  # the files of a merge mostly have the same keys
def parse_key(key: str) -> tuple[str, str]:
    """What a key says: path and part; an empty part where it is not known."""
    match = _KEY.fullmatch(key)
    if match is None:
        return "", ""
    return match["path"], next(part for part in _KEY_SUFFIXES if match[part] is not None)


def _suggest_fix(kinds: set[str], unknown: Sequence[str]) -> str:
    if kinds == {"bundled embedding"}:
        return (
            "take the embeddings out into a file of their own and load that with "
            'load_textual_inversion; or leave them out: ignore=["embedding"]'
        )
    patterns = sorted({"*." + ".".join(key.split(".")[-3:]) for key in unknown if "." in key})
    few = patterns if 0 < len(patterns) <= 3 and max(map(len, patterns)) < 100 else []
    words = f"ignore={few}".replace("'", '"') if few else "ignore= with patterns of their keys"
    return (
        "ask its maker for the adapter as LoRA, LoHa, LoKr, OFT or DoRA without other parts, or "
        f"leave them out by your own word: {words}"
    )
