"""The stage of ``rewrite=True``: what is drawn, what is kept, and that no picture is lost."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import customize
from customize.errors import ConfigError, EndpointError
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Completion
from customize.stages.rewrite import Rewriter
from customize.stages.rewrite_requests import call_seeds
from tests.pipeline.making import concept, modular
from tests.rewriting.local_server import completion, send, serve
from tests.tiny import tiny_flux, tiny_sd, tiny_sdxl
from tests.tiny_rewriter import ScriptedModel, save_tiny_llama

USERS, BETTER = "puppy at the seaside", "a photo of a dog on the beach"


def script(**answers):
    return ScriptedModel({USERS: [BETTER], **answers})


def draw(pipe, prompt=USERS, **call):
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    settings["generator"] = torch.Generator().manual_seed(1)
    return pipe(prompt=prompt, **settings | call)


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(autouse=True)
def _unload(pipe):
    yield
    pipe.unload_custom()


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_the_better_prompt_is_drawn_and_told(make):
    pipe = make()
    expected, plain = draw(pipe, BETTER).images, draw(pipe).images
    pipe.load_custom(Rewriter(script()))
    output = draw(pipe, rewrite=True)
    assert np.array_equal(output.images, expected)
    assert output.prompts == [BETTER]
    assert output.rewritings[0].prompt == USERS
    assert np.array_equal(draw(pipe).images, plain)  # off unless asked
    assert np.array_equal(draw(pipe, rewrite=False).images, plain)
    assert BETTER in str(pipe.custom)
    pipe.unload_custom()
    assert np.array_equal(draw(pipe).images, plain)
    with pytest.raises(ConfigError, match="none is loaded"):
        draw(pipe, rewrite=True)


def test_a_modular_pipeline_takes_the_same_argument():
    pipe = modular(tiny_sdxl())
    call = {"output": "images", "output_type": "np", "num_inference_steps": 2}
    call |= {"height": 32, "width": 32}
    expected = pipe(prompt=BETTER, generator=torch.Generator().manual_seed(1), **call)
    pipe.load_custom(Rewriter(script()))
    noise = torch.Generator().manual_seed(1)
    assert np.array_equal(pipe(prompt=USERS, generator=noise, rewrite=True, **call), expected)


def test_lists_of_prompts_and_negative_prompts(pipe):
    model = script(**{"a cat": ["a photo of a cat"]})
    call = {"negative_prompt": USERS, "num_images_per_prompt": 2}
    expected = draw(pipe, [BETTER, "", "a photo of a cat"], negative_prompt=[USERS] * 3)
    pipe.load_custom(Rewriter(model))
    output = draw(pipe, [USERS, "", "a cat"], rewrite=True, negative_prompt=[USERS] * 3)
    assert np.array_equal(output.images, expected.images)
    assert output.prompts == [BETTER, "", "a photo of a cat"]
    assert [m.content for chat in model.chats for m in chat.messages if m.role == "user"] == [
        Instructions().messages(text)[1].content for text in (USERS, "a cat")
    ]
    assert len(draw(pipe, rewrite=True, **call).images) == 2


def test_a_prompt_is_rewritten_once(pipe):
    model = script()
    pipe.load_custom(Rewriter(model))
    for _ in range(3):
        draw(pipe, rewrite=True)
    assert len(model.chats) == 1
    with pytest.warns(UserWarning, match="repaired, as it lacks seaside"):
        draw(pipe, rewrite=True, keep="seaside")  # another task
    assert len(model.chats) == 3  # the answer lost it, so it was asked twice


def test_the_noise_of_the_picture_is_the_same_with_sampled_rewritings(pipe):
    expected = draw(pipe, BETTER).images
    model = script()
    pipe.load_custom(Rewriter(model, temperature=1.0))
    assert np.array_equal(draw(pipe, rewrite=True).images, expected)
    first = model.chats[0].seed
    noise = torch.Generator().manual_seed(1)
    assert first == int(torch.randint(2**31, (1,), generator=noise))
    torch.manual_seed(3)
    without = draw(pipe, BETTER, generator=None).images
    torch.manual_seed(3)
    assert np.array_equal(draw(pipe, rewrite=True, generator=None).images, without)
    assert model.samplings[0].temperature == 1.0


def test_each_prompt_has_the_seed_of_its_own_generator():
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    seeds = call_seeds({"generator": generators}, 2)
    assert seeds == [call_seeds({"generator": generators[k]}, 1)[0] for k in (0, 2)]
    assert len(set(call_seeds({"generator": generators[0]}, 3))) == 3


def test_triggers_of_concepts_are_kept_and_repaired_by_the_class_word():
    pipe = tiny_sd()
    prompt = "<rex> at the shore"
    pipe.load_custom(concept(pipe))
    expected = draw(pipe, "a photo of <rex> on the beach").images
    pipe.load_custom(Rewriter(ScriptedModel({"<rex>": ["a photo of a dog on the beach"]})))
    with pytest.warns(UserWarning, match=r"repaired, as it lacks <rex>"):
        output = draw(pipe, prompt, rewrite=True)
    assert output.prompts == ["a photo of <rex> on the beach"]
    assert np.array_equal(output.images, expected)


LONG = ", ".join(f"a dog of kind number{chr(97 + k)}" for k in range(20))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_a_rewriting_that_is_longer_than_what_the_text_encoder_reads_is_asked_again(make):
    pipe = make()
    model = ScriptedModel(
        {"dog": [LONG, "a dog on the beach"], "cat": [LONG.replace("dog", "cat")]}
    )
    pipe.load_custom(Rewriter(model))
    assert draw(pipe, "a dog", rewrite=True).prompts == ["a dog on the beach"]
    length = pipe.tokenizer.model_max_length
    count = len(pipe.tokenizer(LONG, verbose=False).input_ids)
    problem = f"it is too long: of its {count} tokens the text_encoder reads {length}"
    assert problem in model.chats[1].messages[-1].content
    with pytest.warns(UserWarning, match="'a cat' is not rewritten, as it is too long"):
        assert draw(pipe, "a cat", rewrite=True).prompts == ["a cat"]


def test_another_encoder_may_read_more_but_each_one_reads_triggers():
    pipe = tiny_flux()
    pipe.load_custom(concept(pipe))
    late = f"{LONG}, <rex>"
    model = ScriptedModel({"a dog": [LONG], "<rex>": [late, "<rex> on the beach"]})
    pipe.load_custom(Rewriter(model))
    assert draw(pipe, "a dog", rewrite=True).prompts == [LONG]
    short = {"max_sequence_length": 40}
    with pytest.warns(UserWarning, match="too long: .* tokens the text_encoder"):
        assert draw(pipe, "a dog", rewrite=True, **short).prompts == ["a dog"]
    assert draw(pipe, "<rex>", rewrite=True).prompts == ["<rex> on the beach"]
    length = pipe.tokenizer.model_max_length
    problem = f"<rex> is not in the first {length} tokens, which the text_encoder reads"
    assert problem in model.chats[-1].messages[-1].content


def test_words_that_other_arguments_name_are_kept(pipe):
    model = ScriptedModel({"dog": ["a photo of a wolf", "a photo of a dog on the beach"]})
    pipe.load_custom(Rewriter(model))
    output = draw(pipe, "dog, shore", rewrite=True, regions={"dog": (0.0, 0.0, 0.5, 1.0)})
    assert output.prompts == ["a photo of a dog on the beach"]
    assert "it lacks dog" in model.chats[1].messages[-1].content


def test_what_the_call_avoids_does_not_come_back(pipe):
    model = ScriptedModel({"dog": ["a dog with a hat", "a dog on the beach"]})
    pipe.load_custom(Rewriter(model))
    output = draw(pipe, "a dog", rewrite=True, avoid="hat, cat")
    assert output.prompts == ["a dog on the beach"]
    assert "it asks for hat" in model.chats[1].messages[-1].content


def test_an_answer_that_fails_twice_leaves_the_prompt_with_a_warning(pipe):
    expected = draw(pipe).images
    pipe.load_custom(Rewriter(ScriptedModel({USERS: ["I'm sorry, I can't."]})))
    with pytest.warns(UserWarning, match="is not rewritten, as it declines"):
        output = draw(pipe, rewrite=True)
    assert np.array_equal(output.images, expected)
    assert output.prompts == [USERS]


def test_an_endpoint_that_is_gone_stops_no_picture(pipe):
    expected = draw(pipe).images
    rewriter = Rewriter.from_endpoint("http://127.0.0.1:9/v1", "llama", timeout=0.5)
    pipe.load_custom(rewriter)
    with pytest.warns(UserWarning, match="drawn as it is, because it could not be rewritten"):
        output = draw(pipe, rewrite=True)
    assert np.array_equal(output.images, expected)
    with pytest.raises(EndpointError):
        rewriter.rewrite(USERS)


def answer_by_prompt(handler):
    """Answer two prompts, and refuse any other one."""
    text = handler.request_body["messages"][1]["content"]
    answers = {USERS: BETTER, "a cat": "a photo of a cat"}
    answer = next((answers[prompt] for prompt in answers if prompt in text), None)
    (send({}, 400) if answer is None else send(completion(answer)))(handler)


def test_a_prompt_that_an_endpoint_refuses_is_drawn_as_it_is(pipe):
    prompts = [USERS, "forbidden", "a cat"]
    with serve(answer_by_prompt) as server:
        rewriter = Rewriter.from_endpoint(server.url, "llama")
        pipe.load_custom(rewriter)
        with pytest.warns(UserWarning, match="the prompt 'forbidden' is drawn as it is.* 400"):
            output = draw(pipe, prompts, rewrite=True)
        assert output.prompts == [BETTER, "forbidden", "a photo of a cat"]
        assert [bool(each.note) for each in output.rewritings] == [False, True, False]
        with pytest.warns(UserWarning, match="'forbidden'"):
            draw(pipe, prompts, rewrite=True)
        assert len(server.requests) == 4  # the refused one was asked again
        with pytest.warns(UserWarning, match="'forbidden'"):
            assert [each.text for each in rewriter.rewrite(prompts)] == output.prompts
        with pytest.raises(EndpointError, match="400"):
            rewriter.rewrite("forbidden")
        with pytest.warns(UserWarning, match="2 prompts, such as 'x', could not be rewritten"):
            draw(pipe, ["x", "y", USERS], rewrite=True)


def test_requests_to_an_endpoint_do_not_wait_for_one_another():
    both = threading.Barrier(2, timeout=60)

    def answer_together(handler):
        both.wait()
        send(completion(BETTER))(handler)

    with serve(answer_together) as server:
        rewriter = Rewriter.from_endpoint(server.url, "llama", timeout=60)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(rewriter.rewrite, ["puppy", "dog"]))
    assert [each.text for (each,) in found] == [BETTER, BETTER]


def test_an_endpoint_rewrites(pipe):
    with serve(send(completion(BETTER))) as server:
        pipe.load_custom(Rewriter.from_endpoint(server.url, "llama"))
        assert draw(pipe, rewrite=True).prompts == [BETTER]


def test_a_local_model_rewrites(pipe, tmp_path):
    rewriter = customize.Rewriter.from_pretrained(save_tiny_llama(tmp_path), max_new_tokens=8)
    pipe.load_custom(rewriter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its random weights
        output = draw(pipe, rewrite=True)
    assert output.prompts == [each.text for each in rewriter.rewrite(USERS)]
    assert [e.text for e in rewriter.rewrite(USERS, n=3, seed=2)] == [
        rewriter.rewrite(USERS, seed=k, temperature=1.0)[0].text for k in (2, 3, 4)
    ]


def test_weights_are_held_on_the_pipelines_device_while_a_new_prompt_is_rewritten(pipe):
    for after_call in ("keep", "offload"):
        model = script()
        pipe.load_custom(Rewriter(model, after_call=after_call))
        draw(pipe, rewrite=True)
        draw(pipe, rewrite=True)  # it is kept, and no weights are needed
        assert model.uses == [("cpu", after_call)]


def test_weights_are_freed_and_loaded_again(tmp_path):
    save_tiny_llama(tmp_path)
    kept = Rewriter.from_pretrained(tmp_path, max_new_tokens=8)
    freed = Rewriter.from_pretrained(tmp_path, max_new_tokens=8, after_call="unload")
    weights = weakref.ref(freed.model.model)
    for prompt in (USERS, "a cat"):
        assert freed.rewrite(prompt) == kept.rewrite(prompt)
        gc.collect()
        assert weights() is None
    assert freed.model.digest == kept.model.digest
    with pytest.raises(ConfigError, match="cannot be loaded again"):
        Rewriter(script(), after_call="unload")


def test_a_pipeline_with_a_local_rewriter_is_copied(tmp_path):
    pipe = tiny_sd()
    pipe.load_custom(Rewriter.from_pretrained(save_tiny_llama(tmp_path), max_new_tokens=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its random weights
        expected = draw(pipe, rewrite=True)
        assert draw(copy.deepcopy(pipe), rewrite=True).prompts == expected.prompts


def test_copies_and_pickles_have_the_settings():
    rewriter = Rewriter(script(), temperature=0.5, keep="golden hour", after_call="offload")
    for made in (copy.deepcopy(rewriter), pickle.loads(pickle.dumps(rewriter))):
        assert (made.sampling, made.keep) == (rewriter.sampling, ("golden hour",))
        assert made.after_call == "offload"
        assert made.rewrite(USERS)[0].text == BETTER


def test_threads_share_a_rewriter():
    rewriter = Rewriter(ScriptedModel({f"puppy {k}": [f"a dog {k}"] for k in range(8)}))
    found = {}

    def work(k):
        found[k] = rewriter.rewrite([f"puppy {k}"] * 3)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k: each[0].text for k, each in found.items()} == {k: f"a dog {k}" for k in range(8)}


class Likeness:
    """The reward of a picture: minus its distance to a given one."""

    name, digest = "likeness", "likeness"

    def __init__(self, target):
        self.target, self.prompts = target, []

    def __call__(self, pictures, prompts):
        self.prompts += prompts
        arrays = [np.asarray(picture, dtype=np.float32) / 255 for picture in pictures]
        return torch.tensor([-float(np.abs(array - self.target).mean()) for array in arrays])


class OfSeeds(ScriptedModel):
    """Answers "a dog" and a number that the seed decides."""

    def _answer(self, chat):
        return Completion(f"a dog {chat.seed % 3}", True)


@pytest.mark.parametrize("wanted", ["a dog 0", "a dog 1", "a dog 2", "dog"])
def test_the_best_of_several_rewritings_is_drawn(pipe, wanted):
    expected = draw(pipe, wanted).images
    reward = Likeness(expected[0])
    model = OfSeeds({})
    pipe.load_custom(Rewriter(model, temperature=1.0, best_of=3, reward=reward))
    output = draw(pipe, "dog", rewrite=True)
    assert output.prompts == [wanted]
    assert np.array_equal(output.images, expected)
    assert set(reward.prompts) == {"dog"}
    assert len(reward.prompts) == 4  # the prompt itself, and three rewritings


def test_the_best_is_chosen_for_each_prompt_and_with_other_stages(pipe):
    call = {"avoid": "hat", "num_images_per_prompt": 2}
    expected = draw(pipe, ["dog", "a dog 1"], **call).images
    reward = Likeness(expected[0])
    pipe.load_custom(Rewriter(OfSeeds({}), temperature=1.0, best_of=3, reward=reward))
    output = draw(pipe, ["dog", "a big dog"], rewrite=True, **call)
    assert output.prompts[0] == "dog"
    assert len(output.images) == 4
    assert np.array_equal(output.images[:2], expected[:2])
    assert reward.prompts[:4] == ["dog", "dog", "a big dog", "a big dog"]


@pytest.mark.parametrize("reward", ["clip", lambda pictures, prompts: 0.0])
def test_a_reward_that_is_none_is_refused_before_anything_is_drawn(reward):
    with pytest.raises(ConfigError, match="is no reward"):
        Rewriter(OfSeeds({}), temperature=1.0, best_of=3, reward=reward)


@pytest.mark.parametrize(
    "settings",
    [
        {"best_of": 2, "temperature": 1.0},
        {"reward": Likeness(0)},
        {"best_of": 2, "reward": Likeness(0)},
        {"best_of": 0},
        {"best_of": True},
        {"best_of": 65, "reward": Likeness(0), "temperature": 1.0},
    ],
)
def test_settings_of_the_best_that_do_not_fit_are_refused(settings):
    with pytest.raises(ConfigError):
        Rewriter(script(), **settings)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"rewrite": "yes"}, "neither True nor False"),
        ({"rewrite": 1}, "neither True nor False"),
        ({"keep": "dog"}, "without rewrite=True"),
        ({"rewrite": True, "keep": 3}, "is not text"),
        ({"rewrite": True, "keep": [""]}, "is not text"),
        ({"rewrite": True, "keep": "umbrella"}, "no prompt contains 'umbrella'"),
        ({"rewrite": True, "prompt": [USERS, None]}, "neither a text nor a list of texts"),
        ({"rewrite": True, "prompt": []}, "neither a text nor a list of texts"),
        ({"rewrite": True, "prompt": "a \x1b[31mdog"}, "has the control character '.x1b'"),
        ({"rewrite": True, "prompt": "a \ud800 dog"}, "has the control character '.ud800'"),
        ({"rewrite": True, "prompt": {0: USERS}}, "neither a text nor a list of texts"),
        ({"rewrite": True, "prompt": "dog " * 2000}, "8,000 characters is too long"),
        ({"rewrite": True, "prompt": None, "prompt_embeds": torch.zeros(1, 4, 8)}, "as text"),
    ],
)
def test_bad_arguments_change_nothing(pipe, call, problem):
    plain = draw(pipe).images
    model = script()
    pipe.load_custom(Rewriter(model))
    with pytest.raises(ConfigError, match=problem):
        draw(pipe, **{"prompt": USERS, **call})
    assert model.chats == []
    assert np.array_equal(draw(pipe).images, plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 3},
        {"temperature": float("nan")},
        {"temperature": True},
        {"max_new_tokens": 0},
        {"after_call": "unlaod"},
        {"keep": 5},
        {"instructions": "be brief"},
    ],
)
def test_bad_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        Rewriter(script(), **settings)
