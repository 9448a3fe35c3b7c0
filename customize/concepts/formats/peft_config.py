"""The peft configuration of an adapter: the meaning of its fields for the saved tensors.

peft writes it to ``adapter_config.json`` beside the tensors; diffusers writes it to the header of
the file, with a component's name in ``save_lora_weights`` and without in
``model.save_lora_adapter``. Each field of peft 0.21 is in one of the tables below: it is applied,
it is visible in the keys of the file, it has no effect on a saved adapter, or it is refused.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from customize.concepts.concept_info import MAX_NAME
from customize.concepts.formats.layer_patterns import PatternMatcher, check_pattern
from customize.errors import ConceptError
from customize.text import one_line

Config = Mapping[str, Any]

#: Fields whose values are used here or in :mod:`customize.concepts.formats.decoders`.
APPLIED = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("use_dora", "init_lora_weights"),
        # of OFT
        *("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    }
)
#: Fields that determine which tensors exist and their shapes; unsupported tensors are refused by
#: their keys.
VISIBLE_IN_KEYS = frozenset(
    {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("bias", "lora_bias", "modules_to_save", "trainable_token_indices"),
        *("ensure_weight_tying", "use_effective_conv2d", "decompose_both", "decompose_factor"),
        *("oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
    }
)
#: Fields of training, of the base, or of layers that diffusion models do not have.
NO_EFFECT = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "megatron_config", "megatron_core"),
        *("lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "boft_dropout"),
        "fan_in_fan_out",  # of transformers' Conv1D; peft resets it for linear layers
        "init_weights",  # zero or random starts of LoHa, LoKr, OFT and BOFT
        # Settings of the initialization: init_lora_weights names the method.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "qalora_group_size",  # read where use_qalora is set
        "velora_config",  # another backward pass
        "monteclora_config",  # noise during training alone
    }
)
#: Field -> its unsupported effect.
REFUSED = {
    "alora_invocation_tokens": "acts from certain tokens of the prompt on (aLoRA)",
    "arrow_config": "routes each token to one of several adapters (Arrow)",
    "kasa_config": "truncates the base's weights (KaSA)",
    "layer_replication": "repeats or reorders the base's layers",
    "target_parameters": "changes parameters that are not layers",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "use_qalora": "pools the layers' inputs (QALoRA)",
}
#: Values of init_lora_weights that do not change the base weights.
BASE_UNCHANGED = frozenset({"gaussian", "eva", "orthogonal", "mica"})
#: Values that subtract a part from the base weights which can be computed again.
RECOMPUTED = frozenset({"pissa", "olora"})

_PEFT_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")
_FIX_AS_LORA = "convert it with peft.save_as_lora, or load it with peft"
_FIX_INITIALIZATION = (
    "save it again where it was trained, by model.save_pretrained(folder, "
    "path_initial_model_for_weight_conversion=...), which gives a LoRA of the unchanged base"
)
_DEFAULT_ALPHA = 8  # of peft's LoraConfig, LoHaConfig and LoKrConfig


def check_config(config: Config, where: object) -> None:
    """Check that a configuration is supported, and warn of unknown fields.

    Raises:
        ConceptError: If a field has an unsupported or invalid value.
    """
    _check_numbers(config, where)
    kind = config.get("peft_type")
    if kind is not None and str(kind).upper() not in _PEFT_TYPES:
        raise ConceptError(
            f"unsupported adapter type {str(kind)[:MAX_NAME]} in the adapter's configuration, only "
            f"{', '.join(_PEFT_TYPES)} are supported",
            where=where,
            fix=_FIX_AS_LORA,
        )
    for field, effect in REFUSED.items():
        if config.get(field):
            raise ConceptError(
                f"the adapter's configuration sets {field}, which {effect}: a plain LoRA of its "
                "tensors would give other images",
                where=where,
                fix=_FIX_AS_LORA,
            )
    _check_initialization(config.get("init_lora_weights"), where)
    known = APPLIED | VISIBLE_IN_KEYS | NO_EFFECT | REFUSED.keys()
    unknown = sorted(str(f)[:MAX_NAME] for f, value in config.items() if value and f not in known)
    if unknown:
        file = one_line(str(where))
        warnings.warn(
            f"{file}: the adapter's configuration sets unknown fields, which are ignored: "
            f"{', '.join(unknown[:10])}",
            stacklevel=2,
        )


def subtracted_initialization(config: Config) -> str | None:
    """The member of :data:`RECOMPUTED` that the adapter was initialized with, or None."""
    start = config.get("init_lora_weights")
    name = start.lower() if isinstance(start, str) else None
    return name if name in RECOMPUTED else None


def adapter_scale(
    config: Config, names: Sequence[str], rank: int | None, matcher: PatternMatcher
) -> float:
    """Compute the factor of a layer's update: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Args:
        config: The configuration.
        names: All names of the layer, which patterns may match.
        rank: The rank of the tensors; None if they show none, for the configuration's rank.
        matcher: Matches the patterns of the file.

    Raises:
        ConceptError: If a pattern takes too long to match.
    """
    default = config.get("lora_alpha")
    default = config.get("alpha") if default is None else default  # of LoHa and LoKr
    if default is None and config.get("r") is not None:
        default = _DEFAULT_ALPHA
    alpha = matcher.value(config.get("alpha_pattern") or {}, names, default)
    if rank is None:
        rank = matcher.value(config.get("rank_pattern") or {}, names, config.get("r"))
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_initialization(start: Any, where: object) -> None:
    """Refuse an initialization that changed the base weights irreproducibly."""
    if start is None or isinstance(start, bool):
        return
    name = str(start).lower()
    if name in BASE_UNCHANGED | RECOMPUTED:
        return
    is_irreproducible = name.startswith(("pissa_niter_", "corda", "loftq", "lora_ga"))
    reason = (
        "which subtracts a part of the base weights that depends on chance, data or quantization"
        if is_irreproducible
        else "which is unknown and may have changed the base weights"
    )
    raise ConceptError(
        f"the adapter was initialized with init_lora_weights={str(start)[:MAX_NAME]}, {reason}: a "
        "plain LoRA of its tensors would give other images",
        where=where,
        fix=_FIX_INITIALIZATION,
    )


def _check_numbers(config: Config, where: object) -> None:
    patterns = [config.get(name) or {} for name in ("alpha_pattern", "rank_pattern")]
    are_dicts = all(isinstance(pattern, dict) for pattern in patterns)
    names = ("r", "lora_alpha", "alpha", "eps", "num_cayley_neumann_terms")
    numbers = [config.get(name) for name in names]
    if are_dicts:
        numbers += [value for pattern in patterns for value in pattern.values()]
    # JSON integers may exceed the range of a float.
    most = sys.float_info.max
    are_valid = all(n is None or (type(n) in (int, float) and 0 <= n <= most) for n in numbers)
    if not are_dicts or not are_valid:
        raise ConceptError(
            "the adapter's configuration has a rank or alpha that is not a number",
            where=where,
            fix="download the file again",
        )
    for flag in ("use_rslora", "use_dora", "coft", "block_share", "use_cayley_neumann"):
        if config.get(flag) not in (None, False, True):
            raise ConceptError(
                f"the adapter's configuration has a value of {flag} that is not true or false",
                where=where,
                fix="download the file again",
            )
    for key in (key for pattern in patterns for key in pattern):
        check_pattern(key, where)
