"""Methods that train rewriters: one file for each, one line for each in the registry.

To add a method, write a file in this folder with its :class:`TrainingMethod`, and list that in
:data:`METHODS`. What it trains with is imported when it is used, as the command line reads the
registry. Settings that no method has yet are fields of
:class:`customize.training.rewriting.config.RewriterTrainConfig`.
"""

from __future__ import annotations

from customize.training.rewriting.methods.dpo import DPO
from customize.training.rewriting.methods.grpo import GRPO
from customize.training.rewriting.methods.method import TrainingMethod
from customize.training.rewriting.methods.sft import SFT

#: Name -> method, in the order in which help texts and error messages list them.
METHODS: dict[str, TrainingMethod] = {
    method.name: method
    for method in (
        SFT,
        DPO,
        GRPO,
    )
}
