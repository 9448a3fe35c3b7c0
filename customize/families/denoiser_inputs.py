"""How the arguments of a family's denoiser encode the prompt and the positions of its output.

Arguments are identified by name, so the caller may be a standard pipeline, a modular one, or one of
several guidance passes. The rows of a call are the pictures of the batch, each with its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from customize.families.adaptable_layers import AdaptableLayers
from customize.families.pipeline_components import uncompiled
from customize.families.token_layout import (
    PromptText,
    TextAttention,
    TokenKind,
    complex_rotations,
)


class DenoiserInputs(AdaptableLayers):
    """Methods that read and change the arguments of the denoisers' calls."""

    #: The denoiser's argument for the latents, with a row for each picture.
    latents_argument: ClassVar[str] = "hidden_states"
    #: The denoiser's argument for the encoded prompts, the first of :meth:`denoiser_kwargs`.
    text_argument: ClassVar[str] = "encoder_hidden_states"
    #: Arguments that are lists with an entry for each row; all others are tensors.
    list_arguments: ClassVar[tuple[str, ...]] = ()
    #: Why the family cannot draw with regions; empty if it can.
    regions_unsupported: ClassVar[str] = ""
    #: Patterns of full layer names -> the positions of these layers; those of other layers, such
    #: as modulations, are the whole picture.
    token_kinds: ClassVar[Mapping[str, TokenKind]] = {}
    #: Patterns of the attentions of the picture to the prompt -> their projections for the queries
    #: of the one and the keys of the other.
    text_attention_kinds: ClassVar[Mapping[str, tuple[str, str]]] = {}
    #: The height and width of a token in the latents of :meth:`latent_grid`.
    token_size: int = 1
    #: Whether the sequence of the picture is padded, so that it may be longer than its tokens.
    pads_tokens: ClassVar[bool] = False
    #: Whether the first rows of the encoded prompt are those of the CLIP text encoders.
    has_clip_rows: ClassVar[bool] = False
    #: The denoiser's argument for the mask of the prompt's padding, (batch, tokens); or empty.
    text_mask_argument: ClassVar[str] = ""

    def denoiser_kwargs(self, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the denoiser's prompt arguments; the first contains the token embeddings.

        Args:
            conditions: As returned by :meth:`Family.encode_prompts`.

        Returns:
            Argument -> (prompts, ...), a list with an entry for each prompt, or a dict of such.
        """
        return {"encoder_hidden_states": conditions["prompt_embeds"]}

    def latent_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Return (rows, columns) of the latents, or of the tokens if the output is in tokens.

        Args:
            arguments: Of a call of the denoiser, by name.
        """
        height, width = arguments[self.latents_argument][0].shape[-2:]
        return height, width

    # -- tokens ------------------------------------------------------------------------------

    def layer_tokens(self, component: str) -> dict[str, TokenKind]:
        """Return the positions of a denoiser's layers.

        Args:
            component: A key of :attr:`denoisers`.

        Returns:
            Full name of a layer -> its positions, without layers that have none.
        """
        found = {name: self._token_kind(name) for name in self.layers(component)}
        return {name: kind for name, kind in found.items() if kind is not None}

    def text_attentions(self, component: str) -> list[TextAttention]:
        """Return the attentions of the picture to the prompt in one of :attr:`denoisers`."""
        return [
            TextAttention(name, query, key, self._token_kind(f"{name}.{query}") or "picture")
            for name, _ in uncompiled(self.components[component]).named_modules()
            for pattern, (query, key) in self.text_attention_kinds.items()
            if re.fullmatch(pattern, name)
        ]

    def _token_kind(self, layer: str) -> TokenKind | None:
        kinds = self.token_kinds.items()
        return next((kind for pattern, kind in kinds if re.fullmatch(pattern, layer)), None)

    def token_grid(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return (frames, rows, columns) of the picture's tokens; a picture has one frame.

        Args:
            arguments: Of a call of the denoiser, by name.
        """
        rows, columns = self.latent_grid(arguments)
        size = self.token_size
        return self._frames(arguments), rows // size, columns // size

    def layer_grid(self, positions: int, grid: tuple[int, int, int]) -> tuple[int, int, int] | None:
        """Return the grid of a layer with this number of positions of the picture.

        Args:
            positions: Of the layer, without those of the prompt.
            grid: Of :meth:`token_grid`.

        Returns:
            (frames, rows, columns); None if the positions are on no grid of the picture.
        """
        frames, rows, columns = grid
        count = frames * rows * columns
        fits = positions >= count if self.pads_tokens else positions == count
        return grid if fits else None

    def token_offsets(
        self, kind: TokenKind, texts: int, grid: tuple[int, int, int]
    ) -> tuple[int, int]:
        """Return the first positions of the picture and of the prompt in a joint sequence.

        Args:
            kind: Of the layer.
            texts: The length of the prompt in the denoiser's arguments.
            grid: Of :meth:`token_grid`.
        """
        return texts, 0

    def rotations(
        self, arguments: Mapping[str, Any], texts: int, grid: tuple[int, int, int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotary embeddings of the picture's queries and of the prompt's keys.

        Args:
            arguments: Of the call of an attention, by name.
            texts: As for :meth:`token_offsets`.
            grid: As for :meth:`token_offsets`.

        Returns:
            (tokens, width / 2) or (batch, tokens, width / 2) each, complex; None where none is
            applied.
        """
        joint = arguments.get("image_rotary_emb")
        if joint is None:
            return None, None
        rotations = complex_rotations(joint)
        return rotations[texts:], rotations[:texts]

    def prompt_text(self, prompt: str) -> PromptText | None:
        """Return what the text encoder without learned tokens reads; None if there is none."""
        return None

    def _frames(self, arguments: Mapping[str, Any]) -> int:
        return 1

    @property
    def window_multiple(self) -> int:
        """The height and width of a window are multiples of it, in latents."""
        return 1

    def window_arguments(
        self, arguments: Mapping[str, Any], rows: slice, columns: slice
    ) -> dict[str, Any] | None:
        """Return the arguments of a call that predicts a window of the picture alone.

        Args:
            arguments: Of a call of the denoiser, by name.
            rows: Of the window, on the grid of :meth:`latent_grid`.
            columns: The same.

        Returns:
            The arguments; None if the family or one of them allows no windows.
        """
        return None

    def broadcast_weights(self, weights: Tensor, answer: Tensor) -> Tensor:
        """Reshape weights of positions to the layout of the denoiser's output.

        Args:
            weights: (rows, columns) of :meth:`latent_grid`.
            answer: The output for one row of the batch, or that row's latents.

        Returns:
            Weights that are broadcastable to the answer.
        """
        return weights

    def noise_level(self, arguments: Mapping[str, Any]) -> float:
        """Return the noise level of a call's timestep, in [0, 1]: 1 is pure noise.

        Args:
            arguments: Of a call of the denoiser, by name.
        """
        return float(torch.as_tensor(arguments["timestep"]).max()) / self._max_timestep

    def schedule_level(self, arguments: Mapping[str, Any]) -> float:
        """Return :meth:`noise_level` before the shift that the model was trained with.

        Models of larger pictures decide on the layout at higher noise levels, for which their
        levels are shifted.

        Args:
            arguments: Of a call of the denoiser, by name.
        """
        return self.noise_level(arguments)

    @property
    def _max_timestep(self) -> float:
        """The denoiser's timestep argument for pure noise."""
        return float(self.components["scheduler"].config.num_train_timesteps)


def weights_per_token(weights: Tensor, answer: Tensor) -> Tensor:
    """Compute :meth:`DenoiserInputs.broadcast_weights` for an answer of (tokens, channels).

    The tokens of reference pictures follow those of the generated picture. Their weight is 0,
    because the pipeline ignores the output for them.
    """
    return functional.pad(weights.flatten(), (0, len(answer) - weights.numel()))[:, None]


def grid_of_positions(positions: Tensor) -> tuple[int, int]:
    """Return (rows, columns) of the generated picture.

    Args:
        positions: (tokens, 3 or more) or (batch, tokens, 3 or more): the picture's index, which is
            0 for the generated one, then row and column of each token.
    """
    tokens = positions[0] if positions.ndim == 3 else positions
    picture = tokens[tokens[:, 0] == 0]
    return int(picture[:, 1].max()) + 1, int(picture[:, 2].max()) + 1


def select_rows(arguments: Mapping[str, Any], rows: Sequence[int], sizes: Mapping[int, int]) -> Any:
    """Return a call's arguments for some rows of its batch.

    Args:
        arguments: By name, with nested dicts, lists and tuples of tensors.
        rows: Indices of rows of the batch.
        sizes: Length of a batched tensor's first axis -> number of its entries per row.
    """

    def select(value: Any) -> Any:
        if isinstance(value, Tensor):
            size = sizes.get(value.shape[0]) if value.ndim else None
            if size is None:
                return value
            return value[[row * size + k for row in rows for k in range(size)]]
        if isinstance(value, Mapping):
            return {name: select(item) for name, item in value.items()}
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            return type(value)(map(select, value))
        return value

    return select(arguments)
