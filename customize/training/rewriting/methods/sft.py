"""Supervised training: the likelihood of good rewritings is maximized."""

from __future__ import annotations

from customize.training.rewriting.methods.method import RewriterRun, TrainerParts, TrainingMethod


def prepare(run: RewriterRun) -> TrainerParts:
    """Return the parts of trl's SFTTrainer.

    Raises:
        ConfigError: A row is longer than ``max_length``.
        PipelineError: The tokenizer adds tokens that the chat template does not have.
    """
    from trl import SFTConfig, SFTTrainer

    from customize.training.rewriting.methods.render_rows import render_rows

    texts = render_rows(run, {"completion": "text"})
    return TrainerParts(texts, SFTTrainer, SFTConfig, {"max_length": run.config.max_length})


SFT = TrainingMethod(
    name="sft",
    summary="rewritings are learned",
    fields=("prompt", "text"),
    learning_rate=1e-4,  # Prompt-A-Video's, of llama-recipes
    prepare=prepare,
)
