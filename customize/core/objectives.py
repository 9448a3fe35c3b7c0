"""Training objectives of diffusion and flow-matching models, and their weightings.

DDPM models draw an integer timestep t and mix latents and noise by ``alphas_cumprod[t]``;
flow-matching models (SD3, FLUX) draw a noise level sigma in (0, 1) and mix linearly. All functions
compute in float32 from latents of any floating dtype and shape (batch, channels, *space), and none
synchronizes with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from customize.core.precision import full_precision
from customize.errors import ConfigError, TrainingError
from customize.near_names import suggest_names

PREDICTIONS = ("epsilon", "v_prediction", "sample")

# The distance of samples in (0, 1) from both ends, where a flow is pure noise or pure data.
_EPSILON = torch.finfo(torch.float32).eps


@full_precision()
def noisy_latents(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return ``sqrt(a_t) * x0 + sqrt(1 - a_t) * noise`` (DDPM, arXiv 2006.11239, eq. 4).

    Args:
        x0: Latents (batch, channels, *space), any floating dtype.
        noise: The same shape.
        alphas_cumprod: (timesteps,), in [0, 1]; keep it on the latents' device to avoid copies.
        t: (batch,), int64.

    Returns:
        x0's shape and dtype, as input of the denoiser.
    """
    signal, sigma = _signal_and_noise_scales(alphas_cumprod, t, x0.ndim)
    return (signal * x0.float() + sigma * noise.float()).to(x0.dtype)


@full_precision()
def target(kind: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return the target of a denoiser's prediction.

    epsilon: the noise. v_prediction: ``sqrt(a_t) * noise - sqrt(1 - a_t) * x0`` (arXiv
    2202.00512, appendix D). sample: x0.

    Args:
        kind: One of PREDICTIONS, the ``prediction_type`` of diffusers' schedulers.
        x0: Latents (batch, channels, *space), any floating dtype.
        noise: The same shape.
        alphas_cumprod: (timesteps,), in [0, 1].
        t: (batch,), int64.

    Returns:
        x0's shape, float32.

    Raises:
        ConfigError: The kind is unknown.
    """
    _check_prediction(kind)
    if kind == "epsilon":
        return noise.float()
    if kind == "sample":
        return x0.float()
    signal, sigma = _signal_and_noise_scales(alphas_cumprod, t, x0.ndim)
    return signal * noise.float() - sigma * x0.float()


@full_precision()
def flow_noisy_latents(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Return ``(1 - sigma) * x0 + sigma * noise``, the path of rectified flow (2403.03206).

    Args:
        x0: Latents (batch, channels, *space), any floating dtype.
        noise: The same shape.
        sigma: Noise levels, (batch,), in [0, 1].

    Returns:
        x0's shape and dtype.
    """
    level = _expand_to_latents(sigma.float(), x0.ndim)
    return ((1.0 - level) * x0.float() + level * noise.float()).to(x0.dtype)


def flow_target(x0: Tensor, noise: Tensor) -> Tensor:
    """Return the velocity of rectified flow, ``noise - x0``: x0's shape, float32."""
    return noise.float() - x0.float()


def snr(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return the signal-to-noise ratio ``a_t / (1 - a_t)``: (batch,), float32, in [0, infinity].

    It is exactly 0 at the last step of a schedule with zero terminal SNR.
    """
    signal = alphas_cumprod.to(device=t.device, dtype=torch.float32)[t]
    return signal / (1.0 - signal)


def unit_weights(t: Tensor) -> Tensor:
    """Return a loss weight of 1 for each sample of t: (batch,), float32, on t's device."""
    return torch.ones(t.shape[0], device=t.device)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Return the loss weight of min-SNR (arXiv 2303.09556) for a prediction type.

    The paper weights the error in x0 by ``min(snr, gamma)``. The squared error in epsilon is that
    error times snr, the squared error in v that error times snr + 1; hence the divisors. The weight
    is finite everywhere: 1 for epsilon at snr 0, 0 for epsilon and v at infinite snr.

    Args:
        snr: (batch,), float32, from :func:`snr`.
        gamma: The limit of the snr, > 0; 5 in the paper.
        prediction: One of PREDICTIONS.

    Returns:
        (batch,), float32.

    Raises:
        ConfigError: The prediction is unknown or gamma is not positive.
    """
    _check_prediction(prediction)
    if not gamma > 0:
        raise ConfigError(f"min-SNR gamma is {gamma}", fix="give a positive gamma; 5 is usual")
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    clipped = snr.clamp(max=gamma)
    return clipped if prediction == "sample" else clipped / (snr + 1.0)


@full_precision()
def uniform(n: int, generator: Generator | None = None) -> Tensor:
    """Draw n samples of the uniform density on (0, 1): (n,), float32, on generator's device."""
    return _clamp_open_interval(
        torch.rand(n, generator=generator, device=_device_of_generator(generator))
    )


@full_precision()
def logit_normal(
    n: int, generator: Generator | None = None, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Draw n samples of ``sigmoid(N(mean, std^2))`` (arXiv 2403.03206, eq. 19): (n,), float32.

    A mean below 0 shifts the density towards data, one above 0 towards noise.
    """
    z = torch.randn(n, generator=generator, device=_device_of_generator(generator))
    return _clamp_open_interval(torch.sigmoid(mean + std * z))


@full_precision()
def mode(n: int, generator: Generator | None = None, scale: float = 1.29) -> Tensor:
    """Draw n samples of the mode density (arXiv 2403.03206, eq. 20): (n,), float32.

    Args:
        n: The number of samples.
        generator: A random generator; None for torch's default.
        scale: In [-1, 2 / (pi - 2)], where the transform of the uniform sample is monotonic.
            Positive values favour the middle, negative ones the ends, 0 is uniform.

    Raises:
        ConfigError: The scale is outside its range.
    """
    if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
        raise ConfigError(
            f"the mode density's scale is {scale}", fix="give a scale from -1 to 2 / (pi - 2)"
        )
    u = torch.rand(n, generator=generator, device=_device_of_generator(generator))
    return _clamp_open_interval(1.0 - u - scale * (torch.cos(math.pi * u / 2.0) ** 2 - 1.0 + u))


@full_precision()
def cosmap(n: int, generator: Generator | None = None) -> Tensor:
    """Draw n samples of ``2 / (pi * (1 - 2 u + 2 u^2))`` (arXiv 2403.03206, eq. 21).

    diffusers' scheme of this name draws uniformly and weights the loss by the density instead: the
    same expected loss with more variance.

    Returns:
        (n,), float32.
    """
    angle = torch.rand(n, generator=generator, device=_device_of_generator(generator)) * (
        math.pi / 2.0
    )
    sine = torch.sin(angle)
    return _clamp_open_interval(
        sine / (sine + torch.cos(angle))
    )  # 1 - 1 / (tan + 1) without its pole


FLOW_DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
}


def shift_sigmas(sigma: Tensor, factor: float) -> Tensor:
    """Return ``factor * sigma / (1 + (factor - 1) * sigma)``, SD3's shift (2403.03206, 5.3.2).

    Args:
        sigma: Noise levels of any shape, in [0, 1].
        factor: > 0; 3 for SD3 at 1024 pixels. FLUX's dynamic shift ``mu`` is the factor
            ``exp(mu)``. Factors above 1 move levels towards noise.

    Returns:
        sigma's shape, in [0, 1].

    Raises:
        ConfigError: The factor is not positive.
    """
    if not factor > 0:
        raise ConfigError(f"the shift of sigmas is {factor}", fix="give a positive shift")
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


@full_precision()
def add_offset_noise(noise: Tensor, strength: float, generator: Generator | None = None) -> Tensor:
    """Add ``strength`` times one normal number for each sample and channel to noise.

    With it an epsilon model can learn to change an image's mean brightness ("Diffusion with Offset
    Noise", Guttenberg 2023).

    Args:
        noise: (batch, channels, *space), any floating dtype.
        strength: About 0.1.
        generator: A random generator on any device; None for torch's default.

    Returns:
        noise's shape and dtype.
    """
    shape = noise.shape[:2] + (1,) * (noise.ndim - 2)
    device = generator.device if generator is not None else noise.device
    offset = torch.randn(shape, generator=generator, device=device).to(noise.device)
    return (noise.float() + strength * offset).to(noise.dtype)


@full_precision()
def weighted_mse(
    pred: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Return the squared error of each sample, averaged over channels and positions.

    Args:
        pred: The prediction, (batch, channels, *space), any floating dtype.
        target: The same shape.
        weight: (batch,), factors of the losses, such as :func:`min_snr_weight`.
        mask: (batch, 1, *space), in [0, 1], at the latents' size. The average is over the mask,
            so a small subject counts as much as a large one; an empty mask gives 0.

    Returns:
        (batch,), float32.

    Raises:
        TrainingError: The shapes do not match; broadcasting would hide a wrong loss.
    """
    _check_shape("the prediction", pred, target.shape)
    error = (pred.float() - target.float()).square()
    if mask is None:
        loss = error.flatten(1).mean(1)
    else:
        _check_shape("the mask", mask, (pred.shape[0], 1, *pred.shape[2:]))
        area = mask.float().flatten(1).sum(1) * pred.shape[1]
        loss = (error * mask.float()).flatten(1).sum(1) / area.clamp(min=_EPSILON)
    if weight is None:
        return loss
    _check_shape("the weight", weight, (pred.shape[0],))
    return loss * weight.float()


def _signal_and_noise_scales(alphas_cumprod: Tensor, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """Return the factors of signal and noise at t, float32, of shape (batch, 1, ...)."""
    signal = alphas_cumprod.to(device=t.device, dtype=torch.float32)[t]
    return _expand_to_latents(signal.sqrt(), ndim), _expand_to_latents((1.0 - signal).sqrt(), ndim)


def _expand_to_latents(per_sample: Tensor, ndim: int) -> Tensor:
    return per_sample.reshape(-1, *(1,) * (ndim - 1))


def _device_of_generator(generator: Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _clamp_open_interval(u: Tensor) -> Tensor:
    return u.clamp(_EPSILON, 1.0 - _EPSILON)


def _check_prediction(kind: str) -> None:
    if kind not in PREDICTIONS:
        raise ConfigError(
            f"the prediction type {kind!r} is unknown", fix=suggest_names(kind, PREDICTIONS)
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise TrainingError(
            f"{name} has shape {tuple(tensor.shape)} instead of {tuple(shape)}",
            fix="resize both to the latents' size before the loss",
        )
