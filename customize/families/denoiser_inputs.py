"""What a call of a family's denoiser says of the prompt, and of which places its answer is.

A call is known by its arguments' names, whoever makes it: a standard pipeline, a modular one, one
of several passes of guidance. Its rows are the pictures of the batch, each with its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from customize.families.adaptable_layers import AdaptableLayers


class DenoiserInputs(AdaptableLayers):
    """How to read and change calls of the denoisers."""

    #: The denoiser's argument that holds the latents, with a row for each picture.
    latents_argument: ClassVar[str] = "hidden_states"
    #: Arguments that are lists with an entry for each row, where others are tensors.
    list_arguments: ClassVar[tuple[str, ...]] = ()
    #: Why no picture can be drawn with regions; empty where it can.
    regions_unsupported: ClassVar[str] = ""

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """The arguments by which the denoiser is told prompts; the first holds their words.

        Args:
            conditions: as :meth:`Family.encode_prompts` gives.

        Returns:
            argument -> (prompts, ...), a list with an entry for each prompt, or a dict of such.
        """
        return {"encoder_hidden_states": conditions["prompt_embeds"]}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, columns) of latents, or of tokens where the denoiser answers by tokens."""
        height, width = arguments[self.latents_argument][0].shape[-2:]
        return height, width

    def broadcast_weights(self, weights: Tensor, answer: Tensor) -> Tensor:
        """Weights laid out as a picture's answer is, or its latents.

        Args:
            weights: (rows, columns), as :meth:`latent_grid` has them.
            answer: of one row of the batch.

        Returns:
            What is broadcastable to the answer.
        """
        return weights

    def noise_level(self, arguments: Mapping[str, Any]) -> float:
        """How far from data the denoiser is told that the latents are: 1 is nothing but noise."""
        return float(torch.as_tensor(arguments["timestep"]).max()) / self._max_timestep

    @property
    def _max_timestep(self) -> float:
        """What the denoiser is told for nothing but noise."""
        return float(self.components["scheduler"].config.num_train_timesteps)


def weights_per_token(weights: Tensor, answer: Tensor) -> Tensor:
    """:meth:`DenoiserInputs.broadcast_weights` for an answer of (tokens, channels).

    Those of reference pictures come behind the picture that is drawn, and have no weight: what is
    answered for them is not used.
    """
    return functional.pad(weights.flatten(), (0, len(answer) - weights.numel()))[:, None]


def grid_of_positions(positions: Tensor) -> tuple[int, int]:
    """(rows, columns) of the picture that is drawn.

    Args:
        positions: (tokens, 3 or more) or (batch, tokens, ...): a picture's number, which is 0 for
            the one that is drawn, then row and column of each token.
    """
    each = positions[0] if positions.ndim == 3 else positions
    own = each[each[:, 0] == 0]
    return int(own[:, 1].max()) + 1, int(own[:, 2].max()) + 1


def select_rows(arguments: Mapping[str, Any], rows: Sequence[int], sizes: Mapping[int, int]) -> Any:
    """Some rows of a call.

    Args:
        arguments: by name; also those of a dict among them.
        rows: of the batch.
        sizes: how long a tensor's first axis is where it holds rows -> how many of its entries
            belong to one row of the batch.
    """

    def chosen(value: Any) -> Any:
        if isinstance(value, Tensor):
            each = sizes.get(value.shape[0]) if value.ndim else None
            if each is None:
                return value
            return value[[row * each + k for row in rows for k in range(each)]]
        if isinstance(value, Mapping):
            return {name: chosen(own) for name, own in value.items()}
        if isinstance(value, list | tuple) and any(isinstance(own, Tensor) for own in value):
            return type(value)(map(chosen, value))
        return value

    return chosen(arguments)
