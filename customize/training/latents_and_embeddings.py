"""Cached inputs of the training loop: latents of images, and conditions of captions.

Latents are cached by the hash of the image's pixels, conditions by caption, and nothing by step, so
that no order of batches can pair an image with another image's caption.
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

#: Name -> tensor (batch, ...), as :meth:`Family.encode_prompts` returns them.
Conditions = Mapping[str, Tensor]
#: Returns the conditions of a batch of captions.
Encode = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class CachedImages:
    """The training images, as latents or pixels.

    The inner lists contain the image and, with flipping, its mirror image.

    Attributes:
        captions: Caption of each image, with triggers.
        latents: Mean and standard deviation, each float32 (channels, height, width), on the device.
            None if latents are not cached; then :attr:`pixels` are encoded at each step.
        pixels: float32 (3, height, width) in [-1, 1], on the CPU; None if latents are cached.
        masks: float32 (1, height, width) in [0, 1], of the latents' size, on the device; None
            without masks.
        sizes: Size of each image in pixels; equal without buckets.
        names: File name of each image.
        shape: (channels, height, width) of the latents of a square image.
    """

    captions: list[str]
    latents: list[list[tuple[Tensor, Tensor]]] | None
    pixels: list[list[Tensor]] | None
    masks: list[list[Tensor]] | None
    sizes: list[dataset.Size]
    names: list[str]
    shape: tuple[int, ...]

    def group_by_size(self, images: Sequence[int]) -> list[slice]:
        """Split a batch into runs of equal size, which the model takes in one call each."""
        runs = groupby(range(len(images)), key=lambda position: self.sizes[images[position]])
        positions = [list(run) for _, run in runs]
        return [slice(run[0], run[-1] + 1) for run in positions]

    def latent_distribution(
        self, family: Family, images: Sequence[int], mirrored: Sequence[bool]
    ) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of a batch.

        Args:
            family: The base model, which encodes pixels if latents are not cached.
            images: Numbers of the images, of one size.
            mirrored: Whether each image is mirrored.

        Returns:
            Two tensors, each float32 (batch, channels, height, width).

        Raises:
            PipelineError: The autoencoder gives values that are not finite.
        """
        batch = list(zip(images, mirrored, strict=True))
        if self.latents is not None:
            pairs = [self.latents[image][is_mirrored] for image, is_mirrored in batch]
            return torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        assert self.pixels is not None
        with torch.no_grad():
            pixels = torch.stack([self.pixels[image][is_mirrored] for image, is_mirrored in batch])
            mean, std = family.encode_images(pixels)
        for row, image in enumerate(images):
            check_latents(family, [mean[row], std[row]], self.names[image])
        return mean, std

    def mask(self, images: Sequence[int], mirrored: Sequence[bool]) -> Tensor | None:
        """Return the masks of a batch, float32 (batch, 1, height, width); None without masks."""
        if self.masks is None:
            return None
        return torch.stack([self.masks[i][m] for i, m in zip(images, mirrored, strict=True)])


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
    """Crop, mirror and encode the training images.

    The autoencoder must be on the device. Images are decoded one at a time, so that only one
    photograph is in memory at its full size.

    Args:
        family: The base model.
        samples: The images.
        resolution: Side of square images in pixels.
        device: Device of the latents and masks.
        flip: Whether mirror images are needed.
        keep_latents: Cache latents; else pixels.
        buckets: Keep aspect ratios, at the sizes of buckets.
        track: Shows a bar; see :meth:`customize.training.progress.Progress.track`.

    Raises:
        DataError: A mask is black in the cropped part of its image.
        PipelineError: The autoencoder gives values that are not finite.
    """
    sizes = [(resolution, resolution)] * len(samples)
    if buckets:
        available = bucket_sizes(resolution, family.latent_multiple)
        sizes = [nearest_bucket(sample.size, available) for sample in samples]

    def with_mirror_image(tensor: Tensor) -> list[Tensor]:
        return [tensor, tensor.flip(-1)] if flip else [tensor]

    has_masks = any(sample.mask_path is not None for sample in samples)
    latents: list[list[tuple[Tensor, Tensor]]] = []
    pixels: list[list[Tensor]] = []
    masks: list[list[Tensor]] = []
    shape: tuple[int, ...] = ()
    cache: dict[str, tuple[Tensor, Tensor]] = {}
    for sample, size in track(list(zip(samples, sizes, strict=True)), "encoding images"):
        loaded = dataset.load_image_and_mask(sample)
        variants = with_mirror_image(dataset.image_tensor(loaded, size))
        if keep_latents:
            latents.append(encode_latents(family, variants, device, cache, sample.path.name))
        else:
            pixels.append(variants)
        if not shape:
            mean, _ = encode_latents(family, variants[:1], device, cache, sample.path.name)[0]
            shape = mean.shape
            factor = size[1] // shape[1]
        if has_masks:
            width, height = size
            mask = dataset.mask_tensor(sample, (width // factor, height // factor), loaded)
            masks.append(with_mirror_image(mask.to(device)))
    return CachedImages(
        captions=[sample.caption for sample in samples],
        latents=latents if keep_latents else None,
        pixels=None if keep_latents else pixels,
        masks=masks if has_masks else None,
        sizes=sizes,
        names=[sample.path.name for sample in samples],
        shape=(shape[0], resolution // factor, resolution // factor),
    )


@torch.no_grad()
def encode_latents(
    family: Family,
    images: Iterable[Tensor],
    device: torch.device,
    cache: dict[str, tuple[Tensor, Tensor]] | None = None,
    name: str = "an image",
) -> list[tuple[Tensor, Tensor]]:
    """Encode images to latent distributions; equal images are encoded once.

    One image at a time, because the autoencoder's activations are the peak of memory here.

    Args:
        family: The base model.
        images: Each float32 (3, height, width) in [-1, 1].
        device: Device of the result.
        cache: :func:`pixels_digest` -> encoded distribution; extended in place.
        name: File name, for errors.

    Returns:
        Mean and standard deviation of each image, each float32 (channels, height / f, width / f).

    Raises:
        PipelineError: The autoencoder gives values that are not finite.
    """
    cache = {} if cache is None else cache
    distributions = []
    for pixels in images:
        key = pixels_digest(pixels)
        if key not in cache:
            mean, std = family.encode_images(pixels[None])
            check_latents(family, [mean, std], name)
            cache[key] = mean[0].to(device), std[0].to(device)
        distributions.append(cache[key])
    return distributions


def pixels_digest(pixels: Tensor) -> str:
    """Return the sha256 over the dtype, shape and bytes of an image."""
    data = pixels.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype} {tuple(data.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_conditions(
    family: Family,
    captions: Iterable[str],
    *,
    live: bool,
    to_encoder: Callable[[str], str],
) -> Encode:
    """Encode captions once where nothing trains, and return the function that encodes a batch.

    Afterwards, text encoders without trained parameters are not needed: all of them unless
    ``live``, else those without the concepts' tokens, such as T5.

    Args:
        family: The base model.
        captions: All captions of the run.
        live: Whether text encoders or tokens are trained, so that each call encodes its captions.
        to_encoder: Returns a caption as the text encoders read it, with expanded triggers.

    Raises:
        PipelineError: A text encoder gives values that are not finite.
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
        # Nothing is cached; one caption shows whether the weights are finite.
        encode_prompts_once(family, list(captions)[:1], to_encoder)
    return lambda batch: encode_unique(
        lambda unique: family.encode_prompts([to_encoder(caption) for caption in unique]), batch
    )


def encode_per_layer(encode: Encode, layer_prompts: Callable[[str], Sequence[str]]) -> Encode:
    """Encode each caption once for each cross-attention layer, with that layer's tokens.

    Args:
        encode: From :func:`cache_conditions`; equal texts are encoded once.
        layer_prompts: Returns the caption for each layer, in order.

    Returns:
        A function from captions to conditions of (batch, layers * length, width).
    """

    def encode_layers(captions: Sequence[str]) -> dict[str, Tensor]:
        encoded = encode([text for caption in captions for text in layer_prompts(caption)])
        return {k: v.reshape(len(captions), -1, v.shape[-1]) for k, v in encoded.items()}

    return encode_layers


def encode_unique(
    encode: Callable[[Sequence[str]], Conditions], captions: Sequence[str]
) -> dict[str, Tensor]:
    """Encode a batch with one row of the text encoder for each distinct caption.

    Returns:
        Name -> (len(captions), ...), differentiable as the encoder is.
    """
    unique = list(dict.fromkeys(captions))
    encoded = encode(unique)
    if len(unique) == len(captions):
        return dict(encoded)
    if len(unique) == 1:
        return {k: v.expand(len(captions), *v.shape[1:]) for k, v in encoded.items()}
    # Indexed by Python numbers, because an index tensor would be copied to the device.
    numbers = {caption: number for number, caption in enumerate(unique)}
    rows = [numbers[caption] for caption in captions]
    return {k: torch.stack([v[row] for row in rows]) for k, v in encoded.items()}


@torch.no_grad()
def encode_prompts_once(
    family: Family, captions: Iterable[str], to_encoder: Callable[[str], str] = str
) -> dict[str, dict[str, Tensor]]:
    """Encode each distinct caption by itself.

    Args:
        family: The base model.
        captions: Captions, with repetitions.
        to_encoder: Returns a caption as the text encoders read it, with expanded triggers.

    Returns:
        Caption -> its conditions, of batch size 1.

    Raises:
        PipelineError: A text encoder gives values that are not finite.
    """
    cache = {}
    for caption in dict.fromkeys(captions):
        conditions = family.encode_prompts([to_encoder(caption)])
        check_conditions(family, conditions, caption)
        cache[caption] = {key: values.clone() for key, values in conditions.items()}
    return cache


def lookup_conditions(
    cache: Mapping[str, Conditions], captions: Sequence[str]
) -> dict[str, Tensor]:
    """Return the conditions of a batch of captions from :func:`encode_prompts_once`.

    Conditions of different lengths are padded; their families have a mask for the padding.
    """

    def lookup(unique: Sequence[str]) -> dict[str, Tensor]:
        rows = [cache[caption] for caption in unique]
        return {key: pad_sequences([row[key][0] for row in rows]) for key in rows[0]}

    return encode_unique(lookup, captions)


class CachedTextEncoder:
    """A cache of a frozen text encoder's outputs, which replaces the encoder in the family.

    If tokens are trained, prompts are encoded at each step by the encoders with these tokens. The
    others, such as T5, the largest component of Stable Diffusion 3, can be freed.

    The first call with given ids runs the encoder. After :meth:`release`, all ids must be cached.

    Attributes:
        wrapped: The encoder; None after :meth:`release`.
    """

    def __init__(self, encoder: Any) -> None:
        self.dtype = encoder.dtype
        self.device = torch.device("cpu")  # callers move the ids here
        self.wrapped = encoder
        self._rows: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> tuple[Tensor]:
        """Return (batch, length, width) states of int64 (batch, length) ids."""
        return (torch.cat([self._row(ids) for ids in input_ids.split(1)]),)

    def release(self) -> None:
        """Free the encoder."""
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
