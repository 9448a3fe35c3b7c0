"""The best of several rewritings, by a reward of their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from customize.evaluation.rewards.reward import Picture, Reward
from customize.evaluation.rewards.score import score
from customize.pipeline.stage import CallArguments, CallContext
from customize.rewriting.rewrite_prompts import Rewriting
from customize.stages.rewrite_requests import copy_generators


def choose_best(
    context: CallContext,
    call: CallArguments,
    candidates: Sequence[Sequence[Rewriting]],
    reward: Reward,
) -> list[Rewriting]:
    """Draw the candidates of each prompt by the settings of a call, and return the best of each.

    Pictures are those that the call would draw: its generators are copied. Candidates whose picture
    the reward cannot score lose; of equal ones the first wins.

    Args:
        context: The pipeline that is called.
        call: The arguments of the call.
        candidates: For each prompt its rewritings, as many for each.
        reward: The reward, which sees the user's prompts.

    Raises:
        PipelineError: The reward failed on all pictures of a round.
    """
    prompts = [rewritings[0].prompt for rewritings in candidates]
    best = [(-float("inf"), rewritings[0]) for rewritings in candidates]
    scored: list[dict[str, float]] = [{} for _ in candidates]
    for chosen in zip(*candidates, strict=True):
        if all(each.text in known for each, known in zip(chosen, scored, strict=True)):
            continue
        pictures = _draw(context, call, [each.text for each in chosen])
        per_prompt = len(pictures) // len(prompts)
        repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
        values = score(reward, pictures, repeated).values.reshape(len(prompts), per_prompt)
        for index, (each, value) in enumerate(zip(chosen, values.mean(1).tolist(), strict=True)):
            scored[index][each.text] = value
            if value > best[index][0]:  # false for NaN
                best[index] = value, each
    return [each for _, each in best]


def _draw(context: CallContext, call: CallArguments, texts: Sequence[str]) -> list[Picture]:
    """Draw texts as a call draws its prompts, without advancing any random state."""
    arguments: dict[str, Any] = {
        name: value for name, value in call.items() if not name.startswith("callback")
    }
    arguments |= {
        name: value for name, value in context.requested.items() if name not in ("rewrite", "keep")
    }
    arguments["prompt"] = texts[0] if isinstance(call["prompt"], str) else list(texts)
    arguments["output_type"] = "pil"
    if arguments.get("generator") is not None:
        arguments["generator"] = copy_generators(arguments["generator"])
    is_modular = "_blocks" in vars(context.pipe)
    arguments |= {"output": "images"} if is_modular else {"return_dict": True}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        output = context.pipe(**arguments)
    return list(output if is_modular else getattr(output, "images", None) or output.frames)
