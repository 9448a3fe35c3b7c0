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

    from customize.training.rewriting.methods.render_rows import render_rows

    texts = render_rows(run, {"chosen": "chosen", "rejected": "rejected"})
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
