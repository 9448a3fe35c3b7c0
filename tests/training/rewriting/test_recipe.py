"""Training of rewriters: what is learned, preferred, resumed and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from customize.errors import ConfigError, DataError, SettingsError, StorageError
from customize.rewriting.cached_models import SMOLLM2
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Chat, Message, Sampling
from customize.rewriting.load_model import (
    SETTINGS_FILE,
    TrainedSettings,
    load_model,
    write_settings,
)
from customize.stages.rewrite import Rewriter
from customize.training.rewriting.config import RewriterTrainConfig
from customize.training.rewriting.rows import read_rows

pytest.importorskip("trl")

from customize.training.rewriting.recipe import train_rewriter
from tests.tiny_rewriter import save_tiny_llama

ROWS = [("puppy", "a photo of a dog"), ("kitty", "a photo of a cat"), ("beach", "on the beach")]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with short instructions, as a trained one has."""
    # Wide enough that a state can be near to one of the frozen embeddings alone.
    folder = save_tiny_llama(tmp_path_factory.mktemp("llama"), width=48)
    settings = TrainedSettings(Instructions("", "{prompt}:"), 12)
    (folder / SETTINGS_FILE).write_text(write_settings(settings))
    return folder


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft_rows(path: Path) -> Path:
    return write(path, [{"prompt": prompt, "text": text} for prompt, text in ROWS])


def dpo_rows(path: Path, chosen="a photo of a dog", rejected="on the beach") -> Path:
    row = {"prompt": "puppy", "chosen": chosen, "rejected": rejected}
    return write(path, [row] * 3)


def config(model: Path, data: Path, output: Path, **changes) -> RewriterTrainConfig:
    settings = {"method": "sft", "epochs": 12, "batch_size": 3, "learning_rate": 1e-2}
    settings |= {"warmup": 0.0, "device": "cpu"}
    files = {"model": str(model), "data": str(data), "output": str(output)}
    return RewriterTrainConfig(**files, **settings | changes)


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "training.json").read_text())["log"]
    return [row["loss"] for row in log if "loss" in row]


@pytest.fixture(scope="module")
def supervised(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    settings = config(model, sft_rows(folder / "rows.jsonl"), folder / "lora", epochs=60)
    return train_rewriter(settings)


def test_supervised_training_learns_the_rewritings(model, supervised):
    before, after = Rewriter.from_pretrained(model), Rewriter.from_pretrained(supervised)
    prompts = [prompt for prompt, _ in ROWS]
    assert [each.text for each in after.rewrite(prompts)] == [text for _, text in ROWS]
    assert [each.text for each in before.rewrite(prompts)] != [text for _, text in ROWS]
    assert after.instructions == before.instructions == Instructions("", "{prompt}:")
    assert after.sampling.max_new_tokens == 12
    assert losses(supervised)[-1] < 0.2 < losses(supervised)[0]


def log_likelihood(folder: Path, text: str) -> float:
    loaded, settings = load_model(folder)
    tokenizer = loaded.tokenizer
    before = loaded.render(settings.instructions.messages("puppy"))
    ids = tokenizer(before + text, return_tensors="pt", add_special_tokens=False).input_ids
    start = len(tokenizer(before, add_special_tokens=False).input_ids)
    with torch.no_grad():
        found = loaded.model(ids).logits[0].log_softmax(-1)
    return float(found[start - 1 : -1].gather(1, ids[0, start:, None]).sum())


def test_preferences_raise_the_chosen_over_the_rejected(model, supervised, tmp_path):
    chosen, rejected = "on the beach", "a photo of a dog"
    data = dpo_rows(tmp_path / "rows.jsonl", chosen, rejected)
    settings = config(supervised, data, tmp_path / "dpo", method="dpo", learning_rate=5e-3)
    trained = train_rewriter(settings)
    margins = [
        log_likelihood(folder, chosen) - log_likelihood(folder, rejected)
        for folder in (supervised, trained)
    ]
    assert margins[1] > margins[0] + 1
    # The reference is the LoRA that was trained on, so that the first loss is log 2.
    assert losses(trained)[0] == pytest.approx(0.6931, abs=1e-3)
    base = json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(model)
    assert not (trained / "ref").exists()


@pytest.mark.parametrize("system", ["be brief\nand kind", ""])
def test_a_system_message_of_its_own_goes_with_the_lora(model, tmp_path, system):
    data = sft_rows(tmp_path / "rows.jsonl")
    folder = train_rewriter(config(model, data, tmp_path / "lora", epochs=1, system=system))
    assert load_model(folder)[1].instructions == Instructions(system, "{prompt}:")


def test_a_lora_of_a_downloaded_model_names_it_without_its_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("CUSTOMIZE_CACHE", str(tmp_path))
    shutil.copytree(model, tmp_path / SMOLLM2)
    data = sft_rows(tmp_path / "rows.jsonl")
    first = train_rewriter(config(Path(SMOLLM2), data, tmp_path / "first", epochs=1))
    again = train_rewriter(config(first, data, tmp_path / "again", epochs=1))
    for folder in (first, again):
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == SMOLLM2
    assert load_model(again)[0].complete([Chat((Message("user", "puppy"),))], Sampling(0.0, 4))


@pytest.mark.parametrize(
    ("warmup", "epochs", "rates"),
    [
        (None, 1, [1e-2]),  # the default
        (0.999, 1, [1e-2]),
        (0.5, 2, [0, 1e-2]),
        (0.999, 3, [0, 5e-3, 1e-2]),
        (0.5, 5, [0, 5e-3, 1e-2, 6.667e-3, 3.333e-3]),
    ],
)
def test_warmup_leaves_a_step_that_learns(model, tmp_path, warmup, epochs, rates):
    """Three rows in batches of three make one step of each epoch."""
    default = RewriterTrainConfig.model_fields["warmup"].default
    warmup = default if warmup is None else warmup
    data = sft_rows(tmp_path / "rows.jsonl")
    folder = train_rewriter(config(model, data, tmp_path / "lora", epochs=epochs, warmup=warmup))
    log = json.loads((folder / "training.json").read_text())["log"]
    logged = [row["learning_rate"] for row in log if "learning_rate" in row]
    assert logged == pytest.approx(rates, rel=0.01)
    weights = load_file(folder / WEIGHTS)
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_an_output_that_is_a_file_is_refused(model, tmp_path):
    data = sft_rows(tmp_path / "rows.jsonl")
    for output in (data, data / "lora"):
        with pytest.raises(StorageError):
            train_rewriter(config(model, data, output))
    assert read_rows(data, ("prompt", "text"))


def test_a_text_that_is_preferred_to_itself_is_refused(tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match="line 1 prefers 'b' to itself"):
        read_rows(data, ("prompt", "chosen", "rejected"))


def test_preferences_without_supervised_training(model, tmp_path):
    data = dpo_rows(tmp_path / "rows.jsonl")
    trained = train_rewriter(config(model, data, tmp_path / "dpo", method="dpo"))
    assert losses(trained)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trained)[-1] < 0.5


def test_a_training_that_was_cut_off_resumes_to_the_same_weights(model, tmp_path):
    data = sft_rows(tmp_path / "rows.jsonl")
    whole = train_rewriter(config(model, data, tmp_path / "whole", epochs=6, checkpoint_every=3))
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoint-6")
    (cut / WEIGHTS).unlink()
    train_rewriter(config(model, data, cut, epochs=6, checkpoint_every=3))
    first, second = load_file(whole / WEIGHTS), load_file(cut / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(SettingsError, match=r"with other settings: learning_rate \("):
        train_rewriter(config(model, data, cut, epochs=6, learning_rate=1e-3))


def test_a_checkpoint_that_was_cut_off_is_passed_over(model, tmp_path):
    data = sft_rows(tmp_path / "rows.jsonl")
    whole = train_rewriter(config(model, data, tmp_path / "whole", epochs=6, checkpoint_every=2))
    for damage in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors"):
        cut = shutil.copytree(whole, tmp_path / damage)
        (cut / "checkpoint-6" / damage).unlink()
        train_rewriter(config(model, data, cut, epochs=6, checkpoint_every=2))
        first, second = load_file(whole / WEIGHTS), load_file(cut / WEIGHTS)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_checkpoints_of_other_data_and_of_a_run_before_are_not_resumed(model, tmp_path):
    data = sft_rows(tmp_path / "rows.jsonl")
    train_rewriter(config(model, data, tmp_path / "out", epochs=4, checkpoint_every=2))
    write(data, [{"prompt": "puppy", "text": "on the beach"}])
    with pytest.raises(SettingsError, match=r"with other settings: content of data \("):
        train_rewriter(config(model, data, tmp_path / "out", epochs=4, checkpoint_every=2))
    # The path of the data may change, with equal content.
    moved = sft_rows(tmp_path / "moved.jsonl")
    train_rewriter(config(model, moved, tmp_path / "out", epochs=4, checkpoint_every=2))
    # A damaged record of the settings is an error of the folder.
    record = tmp_path / "out" / "settings.json"
    for content in ("{", "[]"):
        kept = record.read_text()
        record.write_text(content)
        with pytest.raises(SettingsError, match="cannot be read"):
            train_rewriter(config(model, moved, tmp_path / "out", epochs=4, checkpoint_every=2))
        record.write_text(kept)
    # A new run that is killed before its first checkpoint leaves none of the old one.
    again = config(model, data, tmp_path / "out", epochs=1, checkpoint_every=100, resume=False)
    train_rewriter(again)
    assert not list((tmp_path / "out").glob("checkpoint-[234]"))


def test_rows_longer_than_the_limit_are_refused(model, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "a dog " * 40, "text": "a dog"}])
    with pytest.raises(ConfigError, match=r"line 1 has \d+ tokens"):
        train_rewriter(config(model, data, tmp_path / "out", max_length=64))
    data.write_text('\n{"prompt": "a", "text": "b"}\n' + data.read_text())
    with pytest.raises(ConfigError, match=r"line 3 has \d+ tokens"):
        train_rewriter(config(model, data, tmp_path / "out", max_length=64))
    write(data, [{"prompt": "a dog " * 1500, "text": "a dog"}])
    with pytest.raises(ConfigError, match="and the language model reads 2,048"):
        train_rewriter(config(model, data, tmp_path / "out", max_length=65536))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no rows"),
        ("{", "line 1"),
        ('{"prompt": "a"}', "line 1"),
        ('{"prompt": "a", "text": 3}', "line 1"),
        ('{"prompt": "a", "text": " "}', "line 1"),
        ('{"prompt": "a", "text": "b"}\n\nnull', "line 3"),
        ('{"prompt": "a", "text": NaN}', "line 1"),
        ('{"prompt": "a \\u001b[31m", "text": "b"}', "line 1 has the control character"),
        ('{"prompt": "a", "text": "b \\ud800"}', "line 1 has the control character"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_bad_rows_are_refused(tmp_path, content, problem):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=problem):
        read_rows(path, ("prompt", "text"))


def test_rows_are_numbered_by_lines_of_the_file(tmp_path):
    """U+2028 ends no line of JSON."""
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}\n')
    assert read_rows(path, ("prompt",)) == {2: {"prompt": "a\u2028b"}, 4: {"prompt": "c"}}
    path = tmp_path / "prompts.txt"
    path.write_text("\n a dog \n\na cat")
    assert read_rows(path, ("prompt",)) == {2: {"prompt": "a dog"}, 4: {"prompt": "a cat"}}


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_rows(path, ("prompt", "chosen"))
    (tmp_path / "latin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        read_rows(tmp_path / "latin", ("prompt",))


def test_bad_settings_are_refused(model, tmp_path):
    for changes in (
        {"method": "ppo"},
        {"rank": 0},
        {"method": "dpo", "beta": 0},
        {"beta": 0.1},
        {"epochs": -1},
        {"lr": 1},
        {"method": "dpo", "penalty": 1.0},  # also where it is the default
        {"pictures": 2},
        {"beta": 0.1, "method": "sft"},
    ):
        with pytest.raises(ConfigError):
            config(model, tmp_path, tmp_path, **changes)
