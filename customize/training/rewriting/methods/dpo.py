"""Preference optimization (DPO, arXiv 2305.18290).

The likelihood of a rewriting is raised above that of the rejected one, relative to the model at the
start: a LoRA that is trained on goes on with its own copy as the reference, so a second round needs
no merge.
"""

from __future__ import annotations

from customize.training.rewriting.methods.method import RewriterRun, TrainerParts, TrainingMethod


def prepare(run: RewriterRun) -> TrainerParts:
    """Return the parts of trl's DPOTrainer.

    Raises:
        ConfigError: A row is longer than ``max_length``.
        PipelineError: The tokenizer adds tokens that the chat template does not have.
    """
    from trl import DPOConfig, DPOTrainer

    from customize.training.rewriting.rows import check_length, render_prompt

    texts = [
        {
            "prompt": render_prompt(row["prompt"], run.settings.instructions, run.model),
            "chosen": row["chosen"] + run.model.end,
            "rejected": row["rejected"] + run.model.end,
        }
        for row in run.rows
    ]
    for number, text in enumerate(texts, start=1):
        length = max(
            run.model.count_tokens(text["prompt"] + text[name]) for name in ("chosen", "rejected")
        )
        check_length(number, length, run.config.max_length, run.config.data)
    options = {"max_length": run.config.max_length, "beta": run.config.reference_weight}
    return TrainerParts(texts, DPOTrainer, DPOConfig, options)


DPO = TrainingMethod(
    name="dpo",
    summary="rewritings are preferred to others",
    fields=("prompt", "chosen", "rejected"),
    learning_rate=5e-5,  # Prompt-A-Video's, of trl 0.x
    prepare=prepare,
    beta=0.1,
)
