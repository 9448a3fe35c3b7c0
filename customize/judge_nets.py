"""What the judges of all worlds share: their convolutions, and how their files are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from customize.errors import ConceptError
from customize.safe_read import MAX_TEXT_BYTES, read_json, read_safetensors

_MAX_WEIGHT_BYTES = 2**26


def conv_trunk(widths: tuple[int, ...], channels: int = 3) -> nn.Sequential:
    """Convolutions that halve height and width once for each of the widths.

    Args:
        widths: Channels of each resolution.
        channels: Of the input.
    """
    layers: list[nn.Module] = []
    for width in widths:
        for before, stride in ((channels, 2), (width, 1)):
            layers += [
                nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        channels = width
    return nn.Sequential(*layers)


@contextmanager
def judge_errors(judges: str, folder: Path, fix: str) -> Iterator[None]:
    """Turn errors of reading into a ConceptError.

    Args:
        judges: Whose files are read, such as "the storybook's judges".
        folder: Of the files.
        fix: What the user can do.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        reason = f"the key {error} is missing" if isinstance(error, KeyError) else error
        raise ConceptError(f"{judges} cannot be read: {reason}", where=folder, fix=fix) from error


def read_judges(folder: Path, nets: dict[str, nn.Module]) -> tuple[float, dict[str, Any]]:
    """Load NAME.safetensors of a folder into the nets of these names, in evaluation mode.

    Returns:
        The threshold of the identity, a cosine distance, and the content of judges.json.
    """
    content = read_json(folder / "judges.json", MAX_TEXT_BYTES)
    threshold = float(content["threshold"])
    if not 0 < threshold < 2:
        raise ValueError(f"the threshold {threshold} is not a cosine distance")
    for name, net in nets.items():
        net.load_state_dict(read_tensors(folder / f"{name}.safetensors"))
        net.eval()
    return threshold, content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file as float32."""
    tensors = load(read_safetensors(path, _MAX_WEIGHT_BYTES))
    return {name: tensor.float() for name, tensor in tensors.items()}
