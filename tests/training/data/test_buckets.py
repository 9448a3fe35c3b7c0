from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from customize.errors import DataError
from customize.families import family_of
from customize.training.data.buckets import bucket_sizes, nearest_bucket
from customize.training.data.dataset import read_image
from customize.training.latents_and_embeddings import cache_images
from customize.training.recipe import train
from customize.training.run_metadata import peak_memory
from tests.tiny import tiny_sd, tiny_sdxl
from tests.tiny_families import TINY_FAMILIES
from tests.training.runs import (
    Stop,
    assert_unchanged,
    make_pictures,
    make_various,
    read_images,
    same,
    settings,
    snapshot,
    tensors,
)

pytestmark = pytest.mark.usefixtures("short_padding")


def shapes_of(pipe):
    """Collect the (height, width) of the latents in each call of a UNet."""
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[-2:])))
    return seen


@given(st.sampled_from([8, 16, 32, 64]), st.integers(1, 140))
def test_sizes_are_multiples_and_not_larger_than_the_square(multiple, count):
    side = multiple * count
    sizes = bucket_sizes(side, multiple)
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % multiple == height % multiple == 0 and min(width, height) > 0
        assert width * height <= side**2
        assert (height, width) in sizes
        assert max(width, height) <= 2 * side


def test_sizes_are_those_of_stable_diffusion_xl():
    tall = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216)]
    tall += [(896, 1152), (960, 1088), (1024, 1024)]
    assert bucket_sizes(1024, 8) == sorted({*tall, *(size[::-1] for size in tall)})
    assert bucket_sizes(512, 8) == [(w // 2, h // 2) for w, h in bucket_sizes(1024, 8)]


@given(st.integers(16, 4000), st.integers(16, 4000))
def test_an_image_gets_the_nearest_aspect_ratio(width, height):
    sizes = bucket_sizes(1024, 16)
    bucket = nearest_bucket((width, height), sizes)
    gaps = [abs(np.log(w / h) - np.log(width / height)) for w, h in sizes]
    assert abs(np.log(bucket[0] / bucket[1]) - np.log(width / height)) == pytest.approx(min(gaps))
    if 1 / 4 <= width / height <= 4:  # cropped by at most half the difference of two ratios
        assert min(gaps) < 0.13
    assert nearest_bucket((height, width), sizes) == bucket[::-1]


@pytest.mark.parametrize("make", TINY_FAMILIES.values(), ids=TINY_FAMILIES)
def test_all_families_train_on_images_of_any_aspect_ratio(make, tmp_path):
    make_various(tmp_path)
    pipe = make()
    before = snapshot(pipe.components, pipe.config)
    side = 128 if family_of(pipe.components, pipe.config).latent_multiple > 16 else 32
    kinds = []
    encode = pipe.vae.encode

    def record(pixels, *args, **kwargs):
        kinds.append(tuple(pixels.shape[-2:]))
        return encode(pixels, *args, **kwargs)

    pipe.vae.encode = record
    config = settings(tmp_path, buckets=True, resolution=side, steps=5)
    losses = []
    concept = train(
        config,
        pipe.components,
        progress=False,
        pipeline_config=pipe.config,
        on_step=lambda _, loss: losses.append(float(loss)),
    )
    del pipe.vae.encode
    assert len(set(kinds)) >= 3 and max(h * w for h, w in kinds) == side**2
    assert all(0 < loss < 10 for loss in losses)
    ups = [update.up for updates in concept.updates.values() for update in updates.values()]
    assert sum(float(up.abs().max()) > 0 for up in ups) > 0.8 * len(ups)
    assert_unchanged(before, pipe.components, pipe.config)


def test_each_batch_has_one_size_and_images_are_used_equally_often(tmp_path):
    make_various(tmp_path)
    pipe = tiny_sd()
    seen = shapes_of(pipe)
    config = settings(tmp_path, buckets=True, steps=10, masks=tmp_path / "masks", flip=True)
    train(config, pipe.components, progress=False)
    wide, square, tall, ribbon = (12, 20), (16, 16), (32, 8), (8, 32)
    assert len(seen) == 10
    assert {shape: seen.count(shape) for shape in seen} == {wide: 4, square: 2, tall: 2, ribbon: 2}


def test_square_images_give_the_same_with_and_without_buckets(tmp_path):
    pipe = tiny_sd()
    changes = {"flip": True, "caption_dropout": 0.2, "prior_weight": 1.0}
    changes |= {"prior_images": make_pictures(tmp_path / "dogs", 2)}
    with_, without = (
        train(settings(tmp_path, str(b), buckets=b, **changes), pipe.components, progress=False)
        for b in (True, False)
    )
    assert same(tensors(with_), tensors(without))


@pytest.mark.parametrize("keep", [True, False])
def test_class_images_have_separate_buckets_and_weight(keep, tmp_path):
    make_various(tmp_path / "concept", ((48, 32), (32, 32)))
    make_various(tmp_path / "dogs", ((20, 80), (32, 32)))
    pipe = tiny_sd()
    seen = shapes_of(pipe)
    config = settings(
        tmp_path,
        images=tmp_path / "concept" / "images",
        masks=tmp_path / "concept" / "masks",
        prior_images=tmp_path / "dogs" / "images",
        prior_weight=0.5,
        buckets=True,
        cache_latents=keep,
        steps=8,
    )
    losses = []
    train(
        config,
        pipe.components,
        progress=False,
        on_step=lambda _, loss: losses.append(float(loss)),
    )
    # A step has one call if both halves have one size, otherwise two.
    both = seen.count((16, 16)) + seen.count((12, 20)) + seen.count((32, 8))
    assert both == len(seen) and seen.count((12, 20)) == 4 and seen.count((32, 8)) == 4
    assert 8 <= len(seen) <= 16 and len(losses) == 8


def test_a_resumed_run_gives_the_uninterrupted_result(tmp_path):
    make_various(tmp_path)
    changes = {"buckets": True, "flip": True, "checkpoint_every": 3, "masks": tmp_path / "masks"}
    pipe = tiny_sd()
    whole = train(settings(tmp_path, "a", **changes), pipe.components, progress=False)

    def crash(done, loss):
        if done == 8:
            raise Stop

    config = settings(tmp_path, "b", **changes)
    with pytest.raises(Stop):
        train(config, pipe.components, progress=False, on_step=crash)
    resumed = train(config, pipe.components, progress=False)
    assert same(tensors(whole), tensors(resumed))


def test_time_ids_of_stable_diffusion_xl_have_the_size_of_each_batch(tmp_path):
    make_various(tmp_path, ((48, 32), (20, 80)))
    pipe = tiny_sdxl()
    batch_sizes = []

    def record_shape(_, args, kwargs):
        height, width = (2 * side for side in args[0].shape[-2:])
        batch_sizes.append((height, width))
        expected = pipe._get_add_time_ids(
            (height, width), (0, 0), (height, width), torch.float32, text_encoder_projection_dim=24
        )
        time_ids = kwargs["added_cond_kwargs"]["time_ids"]
        assert torch.equal(time_ids, expected.expand(2, 6))

    pipe.unet.register_forward_pre_hook(record_shape, with_kwargs=True)
    train(settings(tmp_path, buckets=True, steps=4), pipe.components, progress=False)
    assert sorted(set(batch_sizes)) == [(24, 40), (64, 16)]


def test_masks_that_are_black_in_the_trained_area_are_refused(tmp_path):
    """The mask is white at the left end of a wide image, outside of its centre square."""
    make_various(tmp_path, ((64, 32),))
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (0, 0, 12, 32))
    mask.save(tmp_path / "masks" / "0.png")
    changes = {"masks": tmp_path / "masks", "steps": 1}
    with pytest.raises(DataError, match="black all over the centre square"):
        train(settings(tmp_path, **changes), tiny_sd().components, progress=False)
    train(settings(tmp_path, buckets=True, **changes), tiny_sd().components, progress=False)

    # An image of 1:10, which is cropped to 1:4.
    make_various(tmp_path / "ribbon", ((20, 200),))
    mask = Image.new("L", (20, 200), 0)
    mask.paste(255, (0, 0, 20, 40))
    mask.save(tmp_path / "ribbon" / "masks" / "0.png")
    config = settings(
        tmp_path,
        images=tmp_path / "ribbon" / "images",
        masks=tmp_path / "ribbon" / "masks",
        output=tmp_path / "b",
        buckets=True,
    )
    pipe = tiny_sd()
    before = snapshot(pipe.components)
    with pytest.raises(DataError, match=r"black all over the part .*0\.png"):
        train(config, pipe.components, progress=False)
    assert_unchanged(before, pipe.components)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
def test_only_one_image_is_in_memory_at_full_size(tmp_path):
    size, number = (2000, 1500), 24
    one = size[0] * size[1] * 3  # bytes
    (tmp_path / "images").mkdir()
    for index in range(number):
        Image.new("RGB", size, (index, 99, 255)).save(tmp_path / "images" / f"{index}.png")
    config = settings(tmp_path, buckets=True)
    family = family_of(tiny_sd().components)
    cpu = torch.device("cpu")
    read_image(
        tmp_path / "images" / "0.png"
    )  # memory that the libraries allocate at the first image
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory(cpu)
    samples = read_images(config)
    pictures = cache_images(family, samples, 32, cpu, flip=False, keep_latents=True, buckets=True)
    assert len(pictures.latents) == number and len(set(pictures.sizes)) == 1
    # Decoding needs a few copies of one image.
    assert peak_memory(cpu) - before < number * one / 2
