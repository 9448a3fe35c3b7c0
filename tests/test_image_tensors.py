"""Conversion between PIL images and tensors."""

from __future__ import annotations

import torch
from PIL import Image

from customize.image_tensors import images_to_tensor, tensor_to_images


def test_images_to_tensor_and_back() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    image.putpixel((2, 1), (1, 2, 3))
    tensor = images_to_tensor([image, image])
    assert tensor.shape == (2, 3, 2, 3) and tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == [-1.0, 1.0, torch.tensor(51 / 127.5 - 1).item()]
    assert [converted.tobytes() for converted in tensor_to_images(tensor)] == [image.tobytes()] * 2


def test_tensor_to_images_rounds_and_clamps() -> None:
    values = torch.tensor([-2.0, 2.0, 10.4 / 127.5 - 1])
    (image,) = tensor_to_images(values.reshape(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 255, 10)
