"""Online training (GRPO, arXiv 2402.03300): rewritings are sampled, drawn and scored as it goes.

In each step the model writes a group of rewritings of each user prompt. Those whose pictures score
above the group's mean become likelier, the others less likely. Tokens of all rewritings weigh the
same (trl's loss "dapo"), and rewards are of pictures alone, so length earns nothing by itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from customize.errors import ConfigError
from customize.text import plural
from customize.training.rewriting.methods.method import RewriterRun, TrainerParts, TrainingMethod

if TYPE_CHECKING:
    import torch

#: Folder of the pictures, in the output folder.
PICTURES = "pictures"


def prepare(run: RewriterRun) -> TrainerParts:
    """Load base and rewards, and return the parts of trl's GRPOTrainer.

    Raises:
        ConfigError: Several processes train with a Ray cluster, there are fewer prompts than a step
            has, a prompt is longer than ``max_length`` or the model's context with its rewriting,
            or a reward is unknown.
        PipelineError: Base or rewards cannot be loaded, or the tokenizer adds tokens that the chat
            template does not have.
    """
    from trl import GRPOConfig, GRPOTrainer

    from customize.training.rewriting.load_renderer import RendererSettings
    from customize.training.rewriting.methods.render_rows import check_length, render_prompt
    from customize.training.rewriting.open_renderer import open_renderer
    from customize.training.rewriting.picture_reward import PictureReward

    config, instructions = run.config, run.settings.instructions
    _check_one_process(config.ray)
    order = _order_rows(len(run.rows), config.epochs, config.seed)
    _check_number_of_prompts(run, len(order))
    texts = [
        {
            "prompt": render_prompt(row["prompt"], instructions, run.model),
            "user_prompt": row["prompt"],
        }
        for row in run.rows.values()
    ]
    for number, text in zip(run.rows, texts, strict=True):
        length = run.model.count_tokens(text["prompt"]) + run.settings.max_new_tokens
        check_length(run, number, length)
    renderer = run.resources.enter_context(
        open_renderer(
            RendererSettings(
                config.base,
                config.reward,
                config.floor,
                config.reward_model,
                range(config.pictures),
                config.sampling_steps,
                config.guidance,
                config.dtype,
            ),
            config.output / PICTURES,
            config.device if config.ray else str(_process_device(config.device)),
            config.ray,
            config.workers,
            "sampling_steps",
        )
    )
    limits = renderer.token_limits
    reward = PictureReward(renderer, run.model, instructions, config.penalty, limits)
    options = {
        "beta": config.reference_weight,
        "num_generations": config.num_generations,
        # trl counts rewritings, and a batch has whole groups.
        "per_device_train_batch_size": config.batch_size * config.num_generations,
        "temperature": config.temperature,
        "max_completion_length": run.settings.max_new_tokens,
        "num_train_epochs": 1,  # of all passes, in their order
        "shuffle_dataset": False,
    }
    keywords = {"reward_funcs": [reward]}
    return TrainerParts([texts[k] for k in order], GRPOTrainer, GRPOConfig, options, keywords)


def _order_rows(count: int, epochs: float, seed: int) -> list[int]:
    """Return the rows of all passes over the data, each pass in an order of its own.

    trl shuffles each pass by a state that it does not save, so that a resumed training would see
    other prompts, and drops what is left of each pass; here it is left for the next.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows: list[int] = []
    while len(rows) < round(count * epochs):
        rows += torch.randperm(count, generator=generator).tolist()
    return rows[: round(count * epochs)]


def _check_number_of_prompts(run: RewriterRun, count: int) -> None:
    """Refuse data from which trl, which drops batches that are not full, would make no step."""
    config = run.config
    needed = config.batch_size * config.gradient_accumulation
    needed *= int(os.environ.get("WORLD_SIZE", "1"))
    if count < needed:
        raise ConfigError(
            f"all passes over the data have {plural(count, 'prompt')}, and one step takes {needed}",
            where=config.data,
            fix="lower batch_size or gradient_accumulation, or add prompts or epochs",
        )


def _check_one_process(ray: str | None) -> None:
    """Refuse a cluster for each of several training processes."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if ray is not None and count > 1:
        raise ConfigError(
            f"ray draws for one training process, and this training has {count}",
            where="ray",
            fix="leave ray out: each process draws its own rewritings",
        )


def _process_device(name: str | None) -> torch.device:
    """Return the device of the renderer: that of this process among several."""
    import torch

    from customize.base.device import choose_device

    device = choose_device(name, "device")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


GRPO = TrainingMethod(
    name="grpo",
    summary="rewritings are sampled, drawn, scored and made likelier or less likely",
    fields=("prompt",),
    learning_rate=1e-5,  # ten times trl's for whole models, as LoRAs need
    prepare=prepare,
    beta=0.04,  # DeepSeekMath's
    settings=(
        *("base", "dtype", "reward", "reward_model", "floor", "pictures", "sampling_steps"),
        *("guidance", "ray", "workers"),
        *("num_generations", "temperature", "max_new_tokens", "penalty"),
    ),
    required=("base", "reward"),
)
