"""Optimiser of the from-scratch trainings: Muon for hidden matrices, AdamW for the others; an EMA.

Muon (orthogonalized momentum, https://kellerjordan.github.io/posts/muon/) halves the steps that
these small convolution nets need. torch.optim.Muon computes in bfloat16, which takes 20 times as
long on a CPU without bfloat16 instructions; here it is float32. It takes matrices only, so
convolutions are passed as (out, in * kh * kw) views.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Coefficients of the quintic Newton-Schulz iteration, as torch.optim.Muon has them.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: Tensor, steps: int = 4) -> Tensor:
    """Bring the singular values of a matrix near 1 by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns), float32.
        steps: iterations.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw") in float32.

    Args:
        matrices: parameters (rows, columns).
        lr: learning rate; updates are scaled to the RMS of AdamW's.
        weight_decay: decoupled, times the learning rate.
        momentum: of the Nesterov average of gradients.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all matrices that have gradients."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = orthogonalize(matrix.grad.lerp(average, momentum))
                scale = 0.2 * max(matrix.shape) ** 0.5
                matrix.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * scale)


class MuonAdamW:
    """Muon and AdamW behind one `step()`.

    Args:
        modules: name -> module to train.
        lr: learning rate of Muon, whose updates are scaled to the RMS of AdamW's.
        ratio: AdamW's learning rate is `lr * ratio`.
        weight_decay: of both.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        lr: float,
        ratio: float = 0.5,
        weight_decay: float = 0.01,
    ):
        self.lr, self.ratio = lr, ratio
        self.parameters: list[nn.Parameter] = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for module in modules.values():
            for name, parameter in module.named_parameters():
                first_or_last = any(
                    word in name
                    for word in (
                        "embed",
                        "lora_",
                        "reference_tokens",
                        "conv_in",
                        "conv_out",
                        "quant_conv",
                    )
                )
                (others if first_or_last or parameter.ndim < 2 else matrices).append(parameter)
                self.parameters.append(parameter)
        self.matrices = matrices
        self.views = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in matrices]
        self.muon = Muon(self.views, lr, weight_decay)
        self.adamw = torch.optim.AdamW(
            others, lr=lr * ratio, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True
        )

    def zero_grad(self) -> None:
        """Clear all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, schedule: float, clip: float = 1.0) -> torch.Tensor:
        """Clip the gradient norm and update, with both learning rates times `schedule` in [0, 1].

        Returns:
            The norm before clipping.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, clip)
        for group in self.muon.param_groups:
            group["lr"] = self.lr * schedule
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * self.ratio * schedule
        for matrix, view in zip(self.matrices, self.views, strict=True):
            view.grad = matrix.grad.view(view.shape) if matrix.grad is not None else None
        self.muon.step()
        self.adamw.step()
        return norm

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The optimisers' state as named tensors, for a safetensors file."""
        tensors = {}
        for label, optimizer in (("muon", self.muon), ("adamw", self.adamw)):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"{label}.{index}.{key}"] = torch.as_tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state that `state_tensors` returned."""
        for label, optimizer in (("muon", self.muon), ("adamw", self.adamw)):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(label + "."):
                    _, index, key = name.split(".")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


class EMA:
    """An exponential moving average of parameters, with a lower decay in early steps."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.9985):
        self.parameters, self.decay = parameters, decay
        self.average = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the current weights."""
        decay = min(self.decay, (1 + step) / (20 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights with the average; a second call restores them."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(live)


def trapezoid(step: int, steps: int, warmup: int = 50, decay: float = 0.25) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to 2 % over the last share."""
    if step < warmup:
        return (step + 1) / warmup
    tail = steps * (1 - decay)
    return 1.0 if step < tail else max(0.02, (steps - step) / (steps - tail))
