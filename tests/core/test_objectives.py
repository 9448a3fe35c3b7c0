"""Objectives invert to the picture they hide, and agree with diffusers where it has the same."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customize.core import objectives
from customize.core.objectives import (
    FLOW_DENSITIES,
    PREDICTIONS,
    add_offset_noise,
    cosmap,
    flow_noisy_latents,
    flow_target,
    logit_normal,
    min_snr_weight,
    mode,
    noisy_latents,
    shift_sigmas,
    snr,
    target,
    weighted_mse,
)
from customize.errors import ConfigError, TrainingError

STEPS = 1000
# Stable Diffusion's "scaled linear" schedule.
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2).cumprod(0)
# A schedule with both extremes: no noise at the first step, no signal at the last.
ZERO_TERMINAL = torch.linspace(1.0, 0.0, STEPS)

ALL_KINDS = pytest.mark.parametrize("kind", PREDICTIONS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(seed, shape=(3, 4, 5, 2)):
    return torch.randn(2, *shape, generator=generator(seed)).unbind(0)


def _original(kind, prediction, noisy, signal, sigma):
    """x0 from a prediction, by the algebra of the DDIM and progressive distillation papers."""
    if kind == "epsilon":
        return (noisy - sigma * prediction) / signal
    return signal * noisy - sigma * prediction if kind == "v_prediction" else prediction


@ALL_KINDS
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31), steps=st.lists(st.integers(0, STEPS - 1), min_size=3, max_size=3)
)
def test_the_true_target_has_no_loss_and_recovers_the_latents(kind, seed, steps):
    x0, noise = batch(seed)
    t = torch.tensor(steps)
    answer = target(kind, x0, noise, ALPHAS, t)
    assert weighted_mse(answer, target(kind, x0, noise, ALPHAS, t)).tolist() == [0.0] * 3
    noisy = noisy_latents(x0, noise, ALPHAS, t)
    signal, sigma = (factor.sqrt()[t].reshape(3, 1, 1, 1) for factor in (ALPHAS, 1 - ALPHAS))
    assert (_original(kind, answer, noisy, signal, sigma) - x0).abs().max() < 1e-4


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), levels=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_flow_target_recovers_the_latents(seed, levels):
    x0, noise = batch(seed)
    sigma = torch.tensor(levels)
    noisy, velocity = flow_noisy_latents(x0, noise, sigma), flow_target(x0, noise)
    along = sigma.reshape(3, 1, 1, 1)
    assert (noisy - along * velocity - x0).abs().max() < 1e-5
    assert (noisy + (1 - along) * velocity - noise).abs().max() < 1e-5
    assert weighted_mse(velocity, flow_target(x0, noise)).tolist() == [0.0] * 3


@ALL_KINDS
def test_half_precision_latents_are_mixed_in_float32(kind):
    x0, noise = (each.bfloat16() for each in batch(0))
    t = torch.tensor([0, 500, 999])
    noisy, goal = noisy_latents(x0, noise, ALPHAS, t), target(kind, x0, noise, ALPHAS, t)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, noisy_latents(x0.float(), noise.float(), ALPHAS, t).bfloat16())
    assert goal.dtype == torch.float32
    assert torch.equal(goal, target(kind, x0.float(), noise.float(), ALPHAS, t))
    assert flow_target(x0, noise).dtype == torch.float32
    assert flow_noisy_latents(x0, noise, torch.full((3,), 0.3)).dtype == torch.bfloat16


def test_zero_terminal_schedule_is_pure_noise_at_the_end():
    x0, noise = batch(0)
    last = torch.full((3,), STEPS - 1)
    assert torch.equal(noisy_latents(x0, noise, ZERO_TERMINAL, last), noise)
    assert torch.equal(target("v_prediction", x0, noise, ZERO_TERMINAL, last), -x0)


@ALL_KINDS
def test_min_snr_is_finite_on_any_schedule(kind):
    t = torch.arange(STEPS)
    for alphas in (ALPHAS, ZERO_TERMINAL):
        weight = min_snr_weight(snr(alphas, t), 5.0, kind)
        assert weight.isfinite().all()
        assert (weight >= 0).all()
        assert weight.max() <= (5.0 if kind == "sample" else 1.0)


@ALL_KINDS
def test_min_snr_weights_the_same_error_in_x0(kind):
    # One wrong guess of x0, seen through each prediction type, must cost min(snr, gamma) times
    # its squared error: that is what the divisors are for.
    x0, noise = (each.double() for each in batch(1, (6, 4, 5, 2)))
    t = torch.tensor([1, 150, 300, 450, 600, 900])
    signal, sigma = (f.double().sqrt()[t].reshape(6, 1, 1, 1) for f in (ALPHAS, 1 - ALPHAS))
    noisy, wrong = signal * x0 + sigma * noise, x0 + 0.1
    guess = {
        "sample": wrong,
        "epsilon": (noisy - signal * wrong) / sigma,
        "v_prediction": (signal * noisy - wrong) / sigma,
    }[kind]
    ratio = snr(ALPHAS, t)
    loss = weighted_mse(guess, target(kind, x0, noise, ALPHAS, t), min_snr_weight(ratio, 5.0, kind))
    assert torch.allclose(loss, ratio.clamp(max=5.0) * 0.01, rtol=2e-3)


@pytest.mark.parametrize("name", list(FLOW_DENSITIES))
def test_densities_are_open_repeatable_and_match_their_formulas(name):
    draw = FLOW_DENSITIES[name]
    u = draw(200_000, generator(0))
    assert u.dtype == torch.float32
    assert u.min() > 0
    assert u.max() < 1
    assert torch.equal(u, draw(200_000, generator(0)))
    assert draw(3).shape == (3,)

    def cdf(x: float) -> float:
        if name == "uniform":
            return x
        if name == "logit_normal":
            return 0.5 * (1 + math.erf(math.log(x / (1 - x)) / math.sqrt(2)))
        if name == "cosmap":
            return 0.5 + math.atan(2 * x - 1) * 2 / math.pi
        low, high = 0.0, 1.0  # mode: the map falls from 1 to 0, so the cdf is 1 - its inverse
        for _ in range(40):
            middle = (low + high) / 2
            value = 1 - middle - 1.29 * (math.cos(math.pi * middle / 2) ** 2 - 1 + middle)
            low, high = (middle, high) if value > x else (low, middle)
        return 1 - low

    for x in (0.05, 0.25, 0.5, 0.7, 0.95):
        assert (u <= x).float().mean().item() == pytest.approx(cdf(x), abs=0.005)


def test_densities_stay_open_where_float32_saturates():
    assert logit_normal(100, generator(), mean=50.0).max() < 1
    assert logit_normal(100, generator(), mean=-200.0).min() > 0


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.1, 10), st.floats(0.1, 10))
def test_shifts_compose_and_invert(sigma, first, second):
    level = torch.tensor([sigma], dtype=torch.float64)
    assert torch.allclose(
        shift_sigmas(shift_sigmas(level, first), second), shift_sigmas(level, first * second)
    )
    assert torch.allclose(shift_sigmas(shift_sigmas(level, first), 1 / first), level)
    assert shift_sigmas(torch.tensor([0.0, 1.0]), first).tolist() == pytest.approx([0.0, 1.0])


def test_offset_noise_is_constant_over_space():
    noise = torch.zeros(64, 4, 6, 6)
    offset = add_offset_noise(noise, 0.1, generator())
    assert torch.equal(offset, offset[:, :, :1, :1].expand_as(offset))
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=0.2)
    assert torch.equal(offset, add_offset_noise(noise, 0.1, generator()))
    assert add_offset_noise(torch.zeros(2, 4, 3, 6, 6).bfloat16(), 0.1).dtype == torch.bfloat16
    assert torch.equal(add_offset_noise(noise, 0.0), noise)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), weighted=st.booleans(), masked=st.booleans())
def test_weighted_mse_is_the_plain_average(seed, weighted, masked):
    pred, goal = batch(seed)
    weight = torch.rand(3, generator=generator(seed)) if weighted else None
    mask = torch.rand(3, 1, 5, 2, generator=generator(seed)) if masked else None
    loss = weighted_mse(pred, goal, weight, mask)
    over = torch.ones(3, 1, 5, 2) if mask is None else mask
    for i in range(3):
        pixels = (pred[i] - goal[i]).double().square().mean(0)
        expected = (pixels * over[i, 0]).sum() / over[i].sum()
        factor = 1.0 if weight is None else weight[i].item()
        assert loss[i].item() == pytest.approx(factor * expected.item(), rel=1e-4)


def test_weighted_mse_of_masks_precision_and_video():
    pred, goal = torch.ones(2, 4, 6, 6), torch.zeros(2, 4, 6, 6)
    mask = torch.zeros(2, 1, 6, 6)
    mask[0, :, 2, 3] = 1
    assert weighted_mse(pred, goal, mask=mask).tolist() == [1.0, 0.0]
    assert weighted_mse(pred * 300, goal.half(), mask=mask.half())[0] == 90_000  # beyond float16
    clip = weighted_mse(
        torch.ones(1, 4, 3, 6, 6), torch.zeros(1, 4, 3, 6, 6), mask=torch.ones(1, 1, 3, 6, 6)
    )
    assert clip.tolist() == [1.0]
    pred.requires_grad_()
    weighted_mse(pred, goal, mask=mask).sum().backward()
    assert pred.grad.isfinite().all()
    assert pred.grad[mask.expand_as(pred) == 0].abs().max() == 0


def test_mismatched_arguments_are_refused():
    pred = torch.zeros(2, 4, 6, 6)
    with pytest.raises(TrainingError, match="the prediction"):
        weighted_mse(pred, pred[:1])
    with pytest.raises(TrainingError, match="the mask"):
        weighted_mse(pred, pred, mask=torch.ones(2, 1, 48, 48))
    with pytest.raises(TrainingError, match="the weight"):
        weighted_mse(pred, pred, torch.ones(2, 1))
    t = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match="velocity"):
        target("velocity", pred, pred, ALPHAS, t)
    with pytest.raises(ConfigError, match="velocity"):
        min_snr_weight(snr(ALPHAS, t), 5.0, "velocity")
    with pytest.raises(ConfigError, match="gamma"):
        min_snr_weight(snr(ALPHAS, t), 0.0, "epsilon")
    with pytest.raises(ConfigError, match="mode"):
        mode(2, scale=1.8)
    with pytest.raises(ConfigError, match="shift"):
        shift_sigmas(torch.tensor(0.5), 0.0)


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("diffusers.training_utils")


def test_snr_agrees_with_diffusers(theirs):
    t = torch.arange(STEPS)
    scheduler = SimpleNamespace(alphas_cumprod=ALPHAS)
    assert torch.allclose(snr(ALPHAS, t), theirs.compute_snr(scheduler, t), rtol=1e-5)


def test_mixing_agrees_with_the_ddpm_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    x0, noise = batch(2)
    t = torch.tensor([0, 420, 999])
    alphas = scheduler.alphas_cumprod
    assert torch.allclose(noisy_latents(x0, noise, alphas, t), scheduler.add_noise(x0, noise, t))
    velocity = scheduler.get_velocity(x0, noise, t)
    assert torch.allclose(target("v_prediction", x0, noise, alphas, t), velocity)


def test_flow_agrees_with_the_flow_matching_scheduler():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    straight = torch.arange(STEPS, 0, -1) / STEPS
    assert torch.allclose(shift_sigmas(straight, 3.0), scheduler.sigmas)
    dynamic = scheduler.time_shift(1.15, 1.0, straight)
    assert torch.allclose(shift_sigmas(straight, math.exp(1.15)), dynamic)
    x0, noise = batch(3)
    picked = torch.tensor([0, 400, 999])
    noisy = scheduler.scale_noise(x0, scheduler.timesteps[picked], noise)
    assert torch.allclose(flow_noisy_latents(x0, noise, scheduler.sigmas[picked]), noisy, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "ours"),
    [
        ("uniform", lambda n, g: objectives.uniform(n, g)),
        ("logit_normal", lambda n, g: logit_normal(n, g, 0.5, 1.5)),
        ("mode", lambda n, g: mode(n, g, 1.29)),
    ],
)
def test_densities_agree_with_diffusers_draw_for_draw(theirs, scheme, ours):
    expected = theirs.compute_density_for_timestep_sampling(
        scheme, 1000, logit_mean=0.5, logit_std=1.5, mode_scale=1.29, generator=generator(4)
    )
    assert torch.allclose(ours(1000, generator(4)), expected, atol=1e-6)


def test_cosmap_draws_the_density_that_diffusers_weights_by(theirs):
    # E[f(u)] under our draws equals E[weight(u) * f(u)] under uniform draws.
    grid = (torch.arange(100_000) + 0.5) / 100_000
    weight = theirs.compute_loss_weighting_for_sd3("cosmap", grid)
    draws = cosmap(400_000, generator(5))
    for power in (1, 2, 6):
        expected = (weight * grid**power).mean().item()
        assert (draws**power).mean().item() == pytest.approx(expected, abs=2e-3)


def test_schedules_follow_the_timesteps_to_their_device():
    alphas = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)
    t = torch.tensor([1, 3])
    assert snr(alphas, t).dtype == torch.float32
    assert snr(alphas, t).tolist() == pytest.approx([0.7 / 0.3, 0.3 / 0.7])
    on_meta = snr(alphas, t.to("meta"))
    assert on_meta.device.type == "meta"
    x0 = torch.ones(2, 1, 2, 2, device="meta")
    assert noisy_latents(x0, x0, alphas, t.to("meta")).device.type == "meta"
    assert target("v_prediction", x0, x0, alphas, t.to("meta")).device.type == "meta"


def test_small_gammas_and_the_ends_of_mode_scales_are_allowed():
    assert min_snr_weight(torch.tensor([2.0]), 0.5, "epsilon").tolist() == [0.25]
    for scale in (-1.0, -0.5, 2.0 / (math.pi - 2.0)):
        draws = mode(100, torch.Generator().manual_seed(0), scale)
        assert float(draws.min()) > 0 and float(draws.max()) < 1
    for scale in (-1.01, 2.0 / (math.pi - 2.0) + 0.01):
        with pytest.raises(ConfigError, match="mode density"):
            mode(1, None, scale)


@pytest.mark.parametrize("density", FLOW_DENSITIES.values())
def test_densities_draw_from_the_generator(density):
    first, second = (density(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32
    torch.manual_seed(3)
    assert torch.equal(density(5), first)  # torch's default generator


def test_offset_noise_is_added_for_each_sample_and_channel():
    noise = torch.zeros(2, 3, 4, 4, dtype=torch.float16)
    found = add_offset_noise(noise, 0.5, torch.Generator().manual_seed(1))
    expected = 0.5 * torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    assert found.dtype == torch.float16 and found.shape == noise.shape
    assert torch.allclose(found.float(), expected.expand(2, 3, 4, 4), atol=1e-3)
    assert add_offset_noise(noise.to("meta"), 0.5).device.type == "meta"


def test_schedules_in_float64_give_targets_in_float32():
    x0, noise = batch(0)
    t, exact = torch.tensor([1, 500, 999]), ALPHAS.double()
    found = target("v_prediction", x0, noise, exact, t)
    assert found.dtype == torch.float32
    signal = exact[t].sqrt()[:, None, None, None]
    expected = signal * noise.double() - (1 - signal.square()).sqrt() * x0.double()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
