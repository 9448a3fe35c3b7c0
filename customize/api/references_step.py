"""Reference images as a step of a modular Stable Diffusion XL that is built from blocks.

::

    blocks = ModularPipeline.from_pretrained("base").blocks
    blocks.sub_blocks.insert("references", ReferencesStep(), 1)
    pipe = blocks.init_pipeline("base")
    pipe.load_components()
    pipe.load_custom(customize.References.from_pretrained("references"))
    pipe(prompt="a dog on a beach", reference_images="photos", output="images")[0]

The step gives the tokens of the references to diffusers' own blocks, by the names that its
IP-Adapter step has: the input step repeats them, the guider divides them into those of prompts and
of negative prompts, and the denoiser's step hands them to the UNet. A pipeline without the step
recognizes the rows by their encoded prompt instead (:mod:`customize.stages.reference_tokens`).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    PipelineState,
)
from torch import Tensor

from customize.errors import PipelineError
from customize.pipeline.state import get_state
from customize.references.group import ReferenceGroup
from customize.references.images import ARGUMENT
from customize.stages.references import References


class ReferencesStep(ModularPipelineBlocks):
    """Gives the tokens of reference images to diffusers' blocks, as embeddings of an IP-Adapter.

    ``pipe.load_custom(References(...))`` keeps the reference model. A call without the argument has
    no references. In calls with groups for words of the prompt, or with different groups and
    several images of each prompt, which diffusers' input step puts into another order than the
    prompts, the step has no output, and the rows are recognized by their prompt.
    """

    model_name = "stable-diffusion-xl"
    #: So that the stage of ``reference_images=`` passes the encoded groups on to it.
    gives_reference_tokens = True

    @property
    def description(self) -> str:
        """Description of the step, as diffusers prints it."""
        return (
            "Step that reads reference images with the loaded reference model. Insert it before "
            "the input step, in place of the IP-Adapter step or beside it."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The model that reads the tokens, of which dtype they are."""
        return [ComponentSpec("unet", UNet2DConditionModel)]

    @property
    def inputs(self) -> list[InputParam]:
        """Arguments that the step adds to the pipeline's call."""
        return [
            InputParam(
                ARGUMENT,
                description="Images, a folder, or an encoded group, for all prompts; or a list of "
                "groups, one for each prompt.",
            )
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What diffusers' input step reads, by its names."""
        description = (
            "A list with one tensor of (prompts, 1, num_tokens, width): the tokens of {}, in the "
            "dtype of the UNet"
        )
        texts = {
            "ip_adapter_embeds": "the references",
            "negative_ip_adapter_embeds": "no reference",
        }
        return [
            OutputParam(name, type_hint=list[Tensor], description=description.format(text))
            for name, text in texts.items()
        ]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Put the tokens of a call's groups into its state.

        Raises:
            PipelineError: No reference model is loaded.
        """
        block_state: Any = self.get_block_state(state)
        groups: list[ReferenceGroup] | None = block_state.reference_images
        if groups is None:
            return components, state
        attached = get_state(components)
        setting = None if attached is None else attached.get_setting(References)
        if setting is None:
            raise PipelineError(
                "no reference model is loaded",
                where=ARGUMENT,
                fix="load one: pipe.load_custom(customize.References.from_pretrained(...))",
            )
        tokens = torch.stack([group.tokens for group in groups])[:, None]
        negative = setting.model.unconditional_tokens().expand_as(tokens)
        target = {"device": components._execution_device, "dtype": components.unet.dtype}
        # New lists in each call, because diffusers' input step writes into them.
        block_state.ip_adapter_embeds = [tokens.to(**target)]
        block_state.negative_ip_adapter_embeds = [negative.to(**target)]
        self.set_block_state(state, block_state)
        return components, state
