import pytest
import torch

from customize.errors import PipelineError
from customize.families import family_of
from customize.training.data.dataset import read_training_images
from customize.training.latents_and_embeddings import (
    CachedTextEncoder,
    cache_conditions,
    cache_images,
    encode_latents,
    encode_prompts_once,
    encode_unique,
    lookup_conditions,
    pixels_digest,
)
from tests.tiny import tiny_sd, tiny_sd3
from tests.training.runs import make_pictures, picture

CAPTIONS = ["a dog", "a cat", "a dog", ""]


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd3])
@pytest.mark.parametrize("live", [False, True])
def test_conditions_match_their_captions(make, live):
    pipe = make()
    family = family_of(pipe.components)
    with torch.no_grad():
        expected = family.encode_prompts(["the dog", "the cat", "the dog", ""])
        encode = cache_conditions(
            family, CAPTIONS, live=live, to_encoder=lambda c: c.replace("a ", "the ")
        )
        for batch in (CAPTIONS, ["a cat", "a cat"], ["a dog", "a cat"]):
            conditions = encode(batch)
            for key, value in expected.items():
                rows = torch.stack([value[CAPTIONS.index(c)] for c in batch])
                assert torch.allclose(conditions[key], rows, atol=1e-5)


def test_distinct_captions_are_encoded_once_and_gradients_add_up():
    table = torch.nn.Parameter(torch.tensor([[1.0], [2.0]]))
    seen = []

    def encode(prompts):
        seen.append(list(prompts))
        return {"x": table[[["a", "b"].index(p) for p in prompts]]}

    for batch, weights in (("aab", [2, 1]), ("bb", [0, 2]), ("ab", [1, 1])):
        table.grad = None
        encode_unique(encode, list(batch))["x"].sum().backward()
        assert table.grad.flatten().tolist() == weights
    assert seen == [["a", "b"], ["b"], ["a", "b"]]


def test_a_cached_caption_keeps_no_graph():
    family = family_of(tiny_sd().components)
    cache = encode_prompts_once(family, ["a dog", "a cat", "a dog"])
    assert list(cache) == ["a dog", "a cat"]
    assert not lookup_conditions(cache, ["a dog", "a cat"])["prompt_embeds"].requires_grad


def test_equal_images_are_encoded_once(tmp_path):
    pipe = tiny_sd()
    calls = []
    pipe.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    a, b = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    family = family_of(pipe.components)
    latents = encode_latents(family, [a, b, a.clone()], torch.device("cpu"))
    assert len(calls) == 2
    assert latents[0] is latents[2]
    mean, std = family.encode_images(b[None])
    assert torch.equal(latents[1][0], mean[0]) and torch.equal(latents[1][1], std[0])
    assert pixels_digest(a) != pixels_digest(a.reshape(3, 64, 16))


def test_cached_latents_equal_latents_encoded_at_each_step(tmp_path):
    make_pictures(tmp_path)
    picture(1).convert("L").save(tmp_path / "3.png")
    samples = read_training_images(tmp_path, trigger="<rex>", caption="a {}")
    family = family_of(tiny_sd().components)
    cached, fresh = (
        cache_images(family, samples, 32, torch.device("cpu"), flip=True, keep_latents=keep)
        for keep in (True, False)
    )
    assert cached.shape == fresh.shape == (4, 16, 16)
    assert cached.captions == ["a <rex>"] * 4
    assert cached.mask([0], [False]) is None
    for mirrored in ([False, True], [True, True]):
        for x, y in zip(
            cached.latent_distribution(family, [2, 3], mirrored),
            fresh.latent_distribution(family, [2, 3], mirrored),
            strict=True,
        ):
            assert torch.allclose(x, y, atol=1e-5)
    plain, flipped = (cached.latent_distribution(family, [2], [m])[0] for m in (False, True))
    assert not torch.allclose(plain, flipped, atol=1e-3)


def test_masks_match_their_images(tmp_path):
    make_pictures(tmp_path / "images", 2)
    make_pictures(tmp_path / "masks", 2)  # ramps from black to white
    samples = read_training_images(
        tmp_path / "images", trigger="<rex>", caption="a {}", masks=tmp_path / "masks"
    )
    family = family_of(tiny_sd().components)
    images = cache_images(
        family, samples, 32, torch.device("cpu"), flip=True, keep_latents=True
    ).mask([0, 1], [False, True])
    assert images.shape == (2, 1, 16, 16)
    assert 0 <= float(images.min()) < 0.5 < float(images.max()) <= 1
    assert float(images[0, 0, 0, 0]) < float(images[0, 0, 0, -1])
    assert float(images[1, 0, 0, 0]) > float(images[1, 0, 0, -1])


def test_a_cached_encoder_returns_cached_states_and_refuses_new_ids():
    pipe = tiny_sd3()
    ids = pipe.tokenizer_3(["a dog", "a cat"], padding="max_length", max_length=8).input_ids
    ids = torch.tensor(ids)
    remembered = CachedTextEncoder(pipe.text_encoder_3)
    expected = pipe.text_encoder_3(ids)[0]
    assert torch.allclose(remembered(ids)[0], expected, atol=1e-6)
    remembered.release()
    assert torch.allclose(remembered(ids.flip(0))[0], expected.flip(0), atol=1e-6)
    with pytest.raises(PipelineError, match="not encoded"):
        remembered(ids + 1)
