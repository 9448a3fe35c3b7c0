"""Rewriting as a step of a modular pipeline that is built from blocks.

::

    blocks = ModularPipeline.from_pretrained("base").blocks
    blocks.sub_blocks.insert("rewrite", RewriteStep(), 0)
    pipe = blocks.init_pipeline("base")
    pipe.load_components()
    pipe.load_custom(customize.Rewriter.from_pretrained("smollm2-135m-instruct"))
    pipe(prompt="a puppy", enable_prompt_enhancement=True, output="images")[0]

The arguments have the names of diffusers' own step of LTX-2. A modular pipeline without the step
takes ``rewrite=True``, as standard ones do.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines import (
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)

from customize.errors import ConfigError, PipelineError
from customize.pipeline.stage import CallContext
from customize.pipeline.state import get_state
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Sampling
from customize.stages.rewrite import Rewriter, rewrite_for_call
from customize.stages.rewrite_requests import call_requests, check_prompts
from customize.stages.rewrite_warnings import warn_about_notes
from customize.text import quote


class RewriteStep(ModularPipelineBlocks):
    """Overwrites the prompt by a better one of the language model that ``load_custom`` keeps."""

    @property
    def description(self) -> str:
        """Description of the step, as diffusers prints it."""
        return (
            "Step that rewrites the prompt with the loaded language model. Insert it before the "
            "text encoder step."
        )

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments that the step adds to the pipeline's call."""
        return [
            InputParam.template("prompt", required=True),
            InputParam(
                "enable_prompt_enhancement",
                type_hint=bool,
                default=False,
                description="Whether the prompt is rewritten.",
            ),
            InputParam(
                "system_prompt",
                type_hint=str,
                description="System message. None: that of the loaded model.",
            ),
            InputParam(
                "prompt_max_new_tokens",
                type_hint=int,
                description="Maximum number of tokens of a rewriting. None: the loaded model's.",
            ),
            InputParam(
                "prompt_enhancement_seed",
                type_hint=int,
                default=10,
                description="Seed of rewritings at a temperature above 0.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """The prompt that the following steps read."""
        return [
            OutputParam("prompt", type_hint=list, description="The prompts after rewriting."),
            OutputParam("rewritings", type_hint=list, description="The rewriting of each prompt."),
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Rewrite the prompts of a call.

        Raises:
            ConfigError: The prompt is no text, or a value is out of its range.
            PipelineError: No language model is loaded.
        """
        block_state: Any = self.get_block_state(state)
        block_state.rewritings = []
        if not isinstance(block_state.enable_prompt_enhancement, bool):
            raise ConfigError(
                f"{quote(block_state.enable_prompt_enhancement)} is neither True nor False",
                where="enable_prompt_enhancement",
                fix="give True or False",
            )
        if not block_state.enable_prompt_enhancement:
            self.set_block_state(state, block_state)
            return components, state
        attached = get_state(components)
        setting = None if attached is None else attached.get_setting(Rewriter)
        if attached is None or setting is None:
            raise PipelineError(
                "no language model is loaded",
                where="enable_prompt_enhancement",
                fix="load one: pipe.load_custom(customize.Rewriter.from_pretrained(...))",
            )
        prompt = block_state.prompt
        prompts = check_prompts([prompt] if isinstance(prompt, str) else prompt)
        context = CallContext(components, attached, {})
        requests = call_requests(context, state.values, prompts, setting.keep)
        system, tokens = block_state.system_prompt, block_state.prompt_max_new_tokens
        instructions, sampling = setting.instructions, setting.sampling
        if system is not None:
            instructions = Instructions(system, instructions.user)
        if tokens is not None:
            sampling = Sampling(sampling.temperature, tokens)
        seeds = [block_state.prompt_enhancement_seed + k for k in range(len(prompts))]
        block_state.rewritings = rewrite_for_call(
            context, setting, requests, seeds, instructions, sampling
        )
        warn_about_notes(block_state.rewritings)
        block_state.prompt = [each.text for each in block_state.rewritings]
        self.set_block_state(state, block_state)
        return components, state
