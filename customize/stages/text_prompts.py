"""The prompts of a call that a stage encodes anew."""

from __future__ import annotations

from customize.errors import ConfigError
from customize.pipeline.stage import CallArguments


def text_prompts(call: CallArguments, argument: str) -> list[str]:
    """Return the prompts of a call.

    Args:
        call: The arguments of the call.
        argument: The stage's argument that needs them, for the error.

    Raises:
        ConfigError: The prompt is no text or list of texts, or is empty.
    """
    prompt = call.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    is_texts = isinstance(prompts, list | tuple) and all(isinstance(p, str) for p in prompts)
    if not prompts or not is_texts:
        raise ConfigError(
            f"{argument}= needs the prompt as text",
            where="prompt",
            fix="give prompt= a text or a list of texts",
        )
    return list(prompts)
