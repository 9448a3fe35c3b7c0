"""What the loop needs of pictures and prompts, computed once: latents and prompt embeddings.

Latents are kept by picture (its content's hash), embeddings by caption: never by step, so no
reshuffling can pair a picture with another's caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from customize.errors import PipelineError
from customize.families.family import Family
from customize.families.tokenization import pad_sequences
from customize.training.data import dataset
from customize.training.data.buckets import bucket_sizes, nearest_bucket
from customize.training.finite_checks import check_conditions, check_latents
from customize.training.progress import without_progress

Conditions = Mapping[str, Tensor]
Encode = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class CachedImages:
    """The training pictures as the loop takes them. Each entry is [as it is, mirrored].

    Attributes:
        captions: one a picture, with the plain trigger.
        latents: (mean, std), each (channels, h, w), float32, on the device; None if they are not
            kept, and :attr:`pixels` are encoded at every step.
        pixels: (3, height, width), in [-1, 1], on the CPU; None if latents are kept.
        masks: (1, h, w), in [0, 1], at the latents' size, on the device; None without masks.
        sizes: one a picture; they differ in buckets alone.
        names: of the files, for messages.
        shape: (channels, h, w) of the latents of the square.
    """

    captions: list[str]
    latents: list[list[tuple[Tensor, Tensor]]] | None
    pixels: list[list[Tensor]] | None
    masks: list[list[Tensor]] | None
    sizes: list[dataset.Size]
    names: list[str]
    shape: tuple[int, ...]

    def group_by_size(self, pictures: Sequence[int]) -> list[slice]:
        """The pieces of a batch that go through the model together, as all in them are alike."""
        alike = groupby(range(len(pictures)), key=lambda place: self.sizes[pictures[place]])
        pieces = [list(places) for _, places in alike]
        return [slice(places[0], places[-1] + 1) for places in pieces]

    def latent_distribution(
        self, family: Family, pictures: Sequence[int], mirrored: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """(mean, std) of a batch of latents, each (batch, channels, h, w)."""
        chosen = list(zip(pictures, mirrored, strict=True))
        if self.latents is not None:
            pairs = [self.latents[i][m] for i, m in chosen]
            return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        assert self.pixels is not None
        with torch.no_grad():
            found = family.encode_images(torch.stack([self.pixels[i][m] for i, m in chosen]))
        for row, (picture, _) in enumerate(chosen):
            check_latents(family, [values[row] for values in found], self.names[picture])
        return found

    def mask(self, pictures: Sequence[int], mirrored: Sequence[bool]) -> Tensor | None:
        """The batch's masks, (batch, 1, h, w), or None."""
        if self.masks is None:
            return None
        return torch.stack([self.masks[i][m] for i, m in zip(pictures, mirrored, strict=True)])


def cache_images(
    family: Family,
    samples: Sequence[dataset.TrainingImage],
    resolution: int,
    device: torch.device,
    *,
    flip: bool,
    keep_latents: bool,
    buckets: bool = False,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = without_progress,
) -> CachedImages:
    """Crop, mirror and encode the pictures. The autoencoder must be on the device.

    Args:
        track: shows how far it is, as :meth:`customize.training.progress.Progress.track`.

    Raises:
        DataError: a mask is black all over what is left of its picture.
    """
    sizes = [(resolution, resolution)] * len(samples)
    if buckets:
        known = bucket_sizes(resolution, family.latent_multiple)
        sizes = [nearest_bucket(sample.size, known) for sample in samples]

    def both(tensor: Tensor) -> list[Tensor]:
        return [tensor, tensor.flip(-1)] if flip else [tensor]

    masked = any(sample.mask_path is not None for sample in samples)
    latents: list[list[tuple[Tensor, Tensor]]] = []
    pixels: list[list[Tensor]] = []
    masks: list[list[Tensor]] = []
    shape: tuple[int, ...] = ()
    encoded: dict[str, tuple[Tensor, Tensor]] = {}
    # One at a time, so that only one photograph is in memory as a whole.
    pairs = list(zip(samples, sizes, strict=True))
    for sample, size in track(pairs, "encoding pictures"):
        loaded = dataset.load_image_and_mask(sample)
        variants = both(dataset.image_tensor(loaded, size))
        if keep_latents:
            latents.append(encode_latents(family, variants, device, encoded, sample.path.name))
        else:
            pixels.append(variants)
        if not shape:
            mean, _ = encode_latents(family, variants[:1], device, encoded, sample.path.name)[0]
            shape = mean.shape
            factor = size[1] // shape[1]
        if masked:
            width, height = size
            mask = dataset.mask_tensor(sample, (width // factor, height // factor), loaded)
            masks.append(both(mask.to(device)))
    return CachedImages(
        captions=[sample.caption for sample in samples],
        latents=latents if keep_latents else None,
        pixels=None if keep_latents else pixels,
        masks=masks if masked else None,
        sizes=sizes,
        names=[sample.path.name for sample in samples],
        shape=(shape[0], resolution // factor, resolution // factor),
    )


def cache_conditions(
    family: Family,
    captions: Iterable[str],
    *,
    live: bool,
    to_encoder: Callable[[str], str],
) -> Encode:
    """A function from captions to conditions, after all the encoding that needs doing once.

    Afterwards text encoders in which nothing trains are no longer needed: all of them unless
    ``live``, else those without the concept's tokens (T5).

    Args:
        captions: all that will ever be asked for.
        live: whether text encoders or tokens train, so that captions are encoded at each call.
        to_encoder: the caption as the encoders see it (triggers expanded).
    """
    if not live:
        cache = encode_prompts_once(family, captions, to_encoder)
        return lambda batch: lookup_conditions(cache, batch)
    frozen = [key for key in family.other_encoders if family.components.get(key) is not None]
    if frozen:
        for key in frozen:
            family.components[key] = CachedTextEncoder(family.components[key])
        encode_prompts_once(family, captions, to_encoder)
        for key in frozen:
            family.components[key].release()
    else:
        # The encoders train, so nothing is kept; one caption tells whether their weights are whole.
        encode_prompts_once(family, list(captions)[:1], to_encoder)
    return lambda batch: encode_unique(
        lambda distinct: family.encode_prompts([to_encoder(c) for c in distinct]), batch
    )


def encode_per_layer(encode: Encode, wordings: Callable[[str], Sequence[str]]) -> Encode:
    """Encode each caption once for each cross-attention layer, in that layer's wording.

    Args:
        encode: from :func:`cache_conditions`; equal wordings are encoded once.
        wordings: the caption for each layer, in order.

    Returns:
        A function from captions to conditions of (batch, layers * length, width).
    """

    def encode_layers(captions: Sequence[str]) -> dict[str, Tensor]:
        encoded = encode([text for caption in captions for text in wordings(caption)])
        return {k: v.reshape(len(captions), -1, v.shape[-1]) for k, v in encoded.items()}

    return encode_layers


def pixels_digest(pixels: Tensor) -> str:
    """sha256 over the shape and bytes of a picture."""
    data = pixels.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_latents(
    family: Family,
    pictures: Iterable[Tensor],
    device: torch.device,
    cache: dict[str, tuple[Tensor, Tensor]] | None = None,
    name: str = "a picture",
) -> list[tuple[Tensor, Tensor]]:
    """The latents' distribution of each picture; equal pictures are encoded once and shared.

    One picture at a time: the autoencoder's activations are the peak of memory here.

    Args:
        pictures: each (3, height, width), in [-1, 1].
        cache: :func:`pixels_digest` -> what was encoded before; it grows.
        name: of the file, for messages.

    Returns:
        (mean, std) a picture, each (channels, height / f, width / f), float32, on the device.

    Raises:
        PipelineError: the autoencoder gives values that are not finite.
    """
    cache = {} if cache is None else cache
    found = []
    for pixels in pictures:
        key = pixels_digest(pixels)
        if key not in cache:
            mean, std = family.encode_images(pixels[None])
            check_latents(family, [mean, std], name)
            cache[key] = mean[0].to(device), std[0].to(device)
        found.append(cache[key])
    return found


def encode_unique(
    encode: Callable[[Sequence[str]], Conditions], captions: Sequence[str]
) -> dict[str, Tensor]:
    """Encode a batch of captions, each distinct one once: one row of the text encoder a caption.

    Returns:
        name -> (len(captions), ...), differentiable as the encoder is.
    """
    distinct = list(dict.fromkeys(captions))
    encoded = encode(distinct)
    if len(distinct) == len(captions):
        return dict(encoded)
    if len(distinct) == 1:
        return {k: v.expand(len(captions), *v.shape[1:]) for k, v in encoded.items()}
    # Rows are picked by Python numbers: an index tensor would have to cross to the device.
    row = {caption: number for number, caption in enumerate(distinct)}
    rows = [row[caption] for caption in captions]
    return {k: torch.stack([v[i] for i in rows]) for k, v in encoded.items()}


@torch.no_grad()
def encode_prompts_once(
    family: Family, captions: Iterable[str], to_encoder: Callable[[str], str] = str
) -> dict[str, dict[str, Tensor]]:
    """caption -> its conditions, each of batch 1; for text encoders in which nothing trains.

    Args:
        to_encoder: the caption as the encoders see it (triggers expanded).
    """
    found = {}
    for caption in dict.fromkeys(captions):
        conditions = family.encode_prompts([to_encoder(caption)])
        check_conditions(family, conditions, caption)
        found[caption] = {k: v.clone() for k, v in conditions.items()}
    return found


def lookup_conditions(
    cache: Mapping[str, Conditions], captions: Sequence[str]
) -> dict[str, Tensor]:
    """The conditions of a batch of captions from :func:`encode_prompts_once`."""

    def look_up(distinct: Sequence[str]) -> dict[str, Tensor]:
        rows = [cache[caption] for caption in distinct]
        # Families whose prompts differ in length have a mask for what is filled up.
        return {k: pad_sequences([row[k][0] for row in rows]) for k in rows[0]}

    return encode_unique(look_up, captions)


class CachedTextEncoder:
    """A frozen text encoder's outputs for the prompts of a run, in the place of the encoder.

    Where tokens train, prompts are encoded at every step, but only by the encoders in which the
    tokens live: of Stable Diffusion 3, T5, the largest part of all, need not stay.

    The first call with some ids runs the encoder; after :meth:`release` all must be known.

    Attributes:
        wrapped: the encoder; None after :meth:`release`.
    """

    def __init__(self, encoder: Any) -> None:
        self.dtype = encoder.dtype
        self.device = torch.device("cpu")  # where callers put the ids, to be looked up
        self.wrapped = encoder
        self._rows: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> tuple[Tensor]:
        return (torch.cat([self._row(ids) for ids in input_ids.split(1)]),)

    def release(self) -> None:
        """Let go of the encoder."""
        self.wrapped = None

    def _row(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self._rows:
            if self.wrapped is None:
                raise PipelineError(
                    "a prompt was not encoded before the text encoder was freed",
                    fix="report this with the captions that you train on",
                )
            self._rows[key] = self.wrapped(ids.to(self.wrapped.device))[0]
        return self._rows[key]
