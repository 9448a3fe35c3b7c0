"""Training objectives of diffusion and flow-matching models, and their weightings.

Two families share the names: DDPM models draw an integer timestep t and mix by
``alphas_cumprod[t]``; flow-matching models (SD3, FLUX) draw a noise level sigma in (0, 1) and
mix along a straight line. All arithmetic is in float32, whatever the latents' precision, and
nothing here waits for the device. Shapes: latents are (batch, channels, *space).
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

# How far samplers of (0, 1) stay from both ends, where a flow is all noise or all data.
_EPSILON = torch.finfo(torch.float32).eps


@full_precision()
def noisy_latents(x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """``sqrt(a_t) * x0 + sqrt(1 - a_t) * noise`` (DDPM, arXiv 2006.11239, eq. 4).

    Args:
        x0, noise: (batch, channels, *space), any floating dtype.
        alphas_cumprod: (timesteps,), in [0, 1]; keep it on the latents' device, or each call
            copies it there.
        t: (batch,), int64.

    Returns:
        x0's shape and dtype: it goes into the denoiser.
    """
    signal, sigma = _signal_and_noise_scales(alphas_cumprod, t, x0.ndim)
    return (signal * x0.float() + sigma * noise.float()).to(x0.dtype)


@full_precision()
def target(kind: str, x0: Tensor, noise: Tensor, alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """What a denoiser of this prediction type should answer.

    epsilon: the noise. v_prediction: ``sqrt(a_t) * noise - sqrt(1 - a_t) * x0`` (arXiv
    2202.00512, appendix D). sample: x0.

    Args:
        kind: one of PREDICTIONS, as diffusers' schedulers name them.
        x0, noise, alphas_cumprod, t: as :func:`noisy_latents`.

    Returns:
        x0's shape, float32.

    Raises:
        ConfigError: the kind is unknown.
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
    """``(1 - sigma) * x0 + sigma * noise``: the straight path of rectified flow (2403.03206).

    Args:
        x0, noise: (batch, channels, *space), any floating dtype.
        sigma: (batch,), in [0, 1].

    Returns:
        x0's shape and dtype.
    """
    level = _expand_to_latents(sigma.float(), x0.ndim)
    return ((1.0 - level) * x0.float() + level * noise.float()).to(x0.dtype)


def flow_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity of that path, ``noise - x0``: x0's shape, float32."""
    return noise.float() - x0.float()


def snr(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """The signal-to-noise ratio ``a_t / (1 - a_t)``: (batch,), float32, in [0, infinity].

    Exactly 0 at the last step of a zero-terminal-SNR schedule.
    """
    signal = alphas_cumprod.to(device=t.device, dtype=torch.float32)[t]
    return signal / (1.0 - signal)


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """The loss weight of min-SNR (arXiv 2303.09556), per prediction type.

    The paper weights the error in x0 by ``min(snr, gamma)``; the error in epsilon is that error
    times snr, the error in v times snr + 1, hence the divisors. Finite at both ends: at snr 0
    (zero-terminal SNR) epsilon has its limit 1, and at infinite snr epsilon and v have 0.

    Args:
        snr: (batch,), float32, from :func:`snr`.
        gamma: the clip, > 0; the paper's is 5.
        prediction: one of PREDICTIONS.

    Returns:
        (batch,), float32.

    Raises:
        ConfigError: the prediction is unknown or gamma is not positive.
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
    """n draws of the uniform density on (0, 1): (n,), float32, on the generator's device."""
    return _clamp_open_interval(
        torch.rand(n, generator=generator, device=_device_of_generator(generator))
    )


@full_precision()
def logit_normal(
    n: int, generator: Generator | None = None, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """n draws of ``sigmoid(N(mean, std^2))`` (arXiv 2403.03206, eq. 19): (n,), float32.

    The mean moves weight to data (< 0) or noise (> 0).
    """
    z = torch.randn(n, generator=generator, device=_device_of_generator(generator))
    return _clamp_open_interval(torch.sigmoid(mean + std * z))


@full_precision()
def mode(n: int, generator: Generator | None = None, scale: float = 1.29) -> Tensor:
    """n draws of the mode density with heavy tails (arXiv 2403.03206, eq. 20): (n,), float32.

    Args:
        n, generator: as :func:`uniform`.
        scale: in [-1, 2 / (pi - 2)], where the map of the uniform draw is monotonic; positive
            favours the middle, negative the ends, 0 is uniform.

    Raises:
        ConfigError: the scale is outside its range.
    """
    if not -1.0 <= scale <= 2.0 / (math.pi - 2.0):
        raise ConfigError(
            f"the mode density's scale is {scale}", fix="give a scale from -1 to 2 / (pi - 2)"
        )
    u = torch.rand(n, generator=generator, device=_device_of_generator(generator))
    return _clamp_open_interval(1.0 - u - scale * (torch.cos(math.pi * u / 2.0) ** 2 - 1.0 + u))


@full_precision()
def cosmap(n: int, generator: Generator | None = None) -> Tensor:
    """n draws of ``2 / (pi * (1 - 2 u + 2 u^2))`` (arXiv 2403.03206, eq. 21): (n,), float32.

    This draws from the density. diffusers' scheme of this name draws uniformly and weights the
    loss by the density: the same expected loss, with more variance.
    """
    angle = torch.rand(n, generator=generator, device=_device_of_generator(generator)) * (
        math.pi / 2.0
    )
    sine = torch.sin(angle)
    return _clamp_open_interval(
        sine / (sine + torch.cos(angle))
    )  # 1 - 1 / (tan + 1), without the pole


FLOW_DENSITIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "logit_normal": logit_normal,
    "mode": mode,
    "cosmap": cosmap,
}


def shift_sigmas(sigma: Tensor, factor: float) -> Tensor:
    """``factor * sigma / (1 + (factor - 1) * sigma)``: SD3's resolution shift (2403.03206, 5.3.2).

    Args:
        sigma: any shape, in [0, 1].
        factor: > 0; 3 for SD3 at 1024 pixels. FLUX's dynamic shift ``mu`` is factor ``exp(mu)``.

    Returns:
        sigma's shape, in [0, 1]; above 1 the factor moves every level towards noise.

    Raises:
        ConfigError: the factor is not positive.
    """
    if not factor > 0:
        raise ConfigError(f"the shift of sigmas is {factor}", fix="give a positive shift")
    return factor * sigma / (1.0 + (factor - 1.0) * sigma)


@full_precision()
def add_offset_noise(noise: Tensor, strength: float, generator: Generator | None = None) -> Tensor:
    """Noise plus ``strength`` times one normal number per sample and channel.

    It lets an epsilon model learn to move a picture's mean brightness ("Diffusion with Offset
    Noise", Guttenberg 2023; strength about 0.1). The generator may be on another device.

    Args:
        noise: (batch, channels, *space).

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
    """The squared error of each sample, averaged over its pixels and channels.

    Args:
        pred, target: (batch, channels, *space), any floating dtype.
        weight: (batch,), factors of the samples' losses, such as :func:`min_snr_weight`.
        mask: (batch, 1, *space), in [0, 1], at the latents' size. The average is over the mask,
            so a small subject counts as much as a large one; an empty mask gives 0.

    Returns:
        (batch,), float32; average it for the scalar loss.

    Raises:
        TrainingError: the shapes do not fit together (a broadcast would hide a wrong loss).
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
    """The factors of signal and noise at t, float32, shaped to multiply latents."""
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


def _check_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise TrainingError(
            f"{what} has shape {tuple(tensor.shape)} where {tuple(shape)} is needed",
            fix="bring both to the latents' size before the loss",
        )
