"""Settings that are fine each by itself, and contradict one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from customize.safe_read import real_path
from customize.training.settings_file import contains_trigger

if TYPE_CHECKING:
    from customize.training.config import TrainConfig


def find_contradictions(config: TrainConfig) -> dict[str, str]:
    """Setting -> what is wrong with it, beside the others, and what to do."""
    images, output = real_path(config.images), real_path(config.output)
    checks = {
        "output": images.is_relative_to(output)
        and "contains the pictures (images), which a new concept would replace; choose a"
        " folder of its own",
        "masks": config.masks is not None
        and real_path(config.masks) == images
        and "is the folder of the pictures; put masks of the same names in another",
        "preserve": _in_preserve(config),
        "preserve_phrases": bool(config.preserve_phrases)
        and not config.preserve.keys() - {"output"}
        and "is not used; set preserve to class_text, context_text or context_output (--preserve)",
        "preserve_pooling": config.preserve_pooling == "published" and _in_pooling(config),
        "prior_images": config.prior_images is not None
        and _in_prior_images(config, real_path(config.prior_images) == images),
        "prior_prompt": contains_trigger(config.prior_prompt or "", config.trigger)
        and f"has the trigger {config.trigger}; class pictures show the class without it",
        "slice": config.slice is not None
        and config.method == "lora"
        and "has no meaning for method lora; leave it out, or set method orthogonal"
        " (--method orthogonal)",
        "layerwise_tokens": config.layerwise_tokens
        and not config.train_tokens
        and "needs trained tokens; set train_tokens to true (--train-tokens)",
        "compile": config.compile
        and config.quantize.startswith("torchao")
        and f"does not work on weights of {config.quantize}; set quantize to nf4, int8 or none"
        " (--quantize none)",
        "validation_every": config.validation_every > 0
        and not config.validation_prompts
        and "has nothing to draw; give validation_prompts (--validation-prompts)",
        "warmup_steps": config.warmup_steps >= config.steps
        and f"leaves nothing of the {config.steps} steps; choose fewer",
    }
    return {field: problem for field, problem in checks.items() if problem}


def _in_preserve(config: TrainConfig) -> str | None:
    if config.preserve and contains_trigger(config.class_word, config.trigger):
        return f"compares with the class, but the class_word has the trigger {config.trigger}"
    if config.text_losses and not (config.train_tokens or config.train_text_encoder):
        return (
            f"has {' and '.join(config.text_losses)}, but no text encoder learns anything; set"
            " train_tokens or train_text_encoder to true (--train-tokens, --train-text-encoder)"
        )
    return None


def _in_pooling(config: TrainConfig) -> str | None:
    if "class_text" not in config.preserve:
        return "is of class_text alone; set preserve to class_text (--preserve)"
    if not config.train_tokens:
        return "takes the feature at the concept's token; set train_tokens to true (--train-tokens)"
    return None


def _in_prior_images(config: TrainConfig, same: bool) -> str | None:
    if same:
        return "is the folder of the concept's own pictures; give others of the class"
    if config.prior_weight == 0:
        return "is not used while prior_weight is 0; set prior_weight to 1 (--prior-weight 1)"
    return None
