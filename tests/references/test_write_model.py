"""Saving a reference model: what is replaced, what stays, and what errors and crashes leave."""

from __future__ import annotations

import os

import pytest
import torch

from customize.errors import ConceptError, StorageError
from customize.references.model import ReferenceModel
from tests.references.tiny_model import tiny_reference_model
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def model():
    return tiny_reference_model(tiny_sd().components)


@pytest.fixture(scope="module")
def other():
    model = tiny_reference_model(tiny_sd().components)
    model.encoder.final_layer.reference_tokens.data.add_(1.0)
    return model


@pytest.fixture
def folder(model, tmp_path):
    """The folder of a training run with its model, and a file of the user."""
    folder = model.save_pretrained(tmp_path / "refs")
    (folder / ".checkpoints").mkdir()
    for name in (".checkpoints/step-2.safetensors", "training.json", "processor/merges.txt"):
        (folder / name).write_text("of the run")
    (folder / "encoder" / "notes.txt").write_text("mine")
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fail_at(monkeypatch, number):
    """Let the renaming of this number fail; the result has the names that were renamed."""
    replace, names = os.replace, []

    def fail(source, target):
        names.append(str(target))
        if len(names) == number:
            raise PermissionError(13, "Permission denied", str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    return names


def test_the_files_of_the_model_are_replaced_and_others_stay(model, other, folder, tmp_path):
    before = contents(folder)
    other.save_pretrained(folder)
    assert ReferenceModel.from_pretrained(folder).digest == other.digest != model.digest
    after = contents(folder)
    # Facts on the training of the model before, and a file that its tokenizer alone has.
    assert before.keys() - after.keys() == {"training.json", "processor/merges.txt"}
    assert after.keys() <= before.keys()
    for name in (".checkpoints/step-2.safetensors", "encoder/notes.txt"):
        assert after[name] == before[name]
    new = other.save_pretrained(tmp_path / "new")
    assert {name: after[name] for name in contents(new)} == contents(new)
    assert {path.name for path in tmp_path.iterdir()} == {"refs", "new"}


def test_a_run_without_a_model_gets_one(model, tmp_path):
    checkpoint = tmp_path / "refs" / ".checkpoints" / "step-2.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of the run")
    folder = model.save_pretrained(tmp_path / "refs")
    assert checkpoint.read_text() == "of the run"
    assert ReferenceModel.from_pretrained(folder).digest == model.digest


def test_folders_of_others_are_refused(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds other files"):
        model.save_pretrained(other)
    with pytest.raises(StorageError, match="is a file"):
        model.save_pretrained(other / "notes.txt")
    assert contents(other) == {"notes.txt": b"mine"}


def test_an_error_at_any_file_restores_the_model_before(other, folder, monkeypatch):
    before = contents(folder)
    failed = 0
    while True:
        with monkeypatch.context() as patch:
            names = fail_at(patch, failed + 1)
            try:
                other.save_pretrained(folder)
                break
            except StorageError:
                failed += 1
        assert contents(folder) == before, names[-1]
        assert not [name for name in os.listdir(folder) if name.endswith(".partial")]
    assert failed > 10
    assert ReferenceModel.from_pretrained(folder).digest == other.digest


def test_a_run_keeps_its_files_after_an_error(model, tmp_path, monkeypatch):
    (tmp_path / ".checkpoints").mkdir()
    with monkeypatch.context() as patch:
        fail_at(patch, 4)
        with pytest.raises(StorageError, match="cannot be written"):
            model.save_pretrained(tmp_path)
    assert contents(tmp_path) == {}
    assert (tmp_path / ".checkpoints").is_dir()


def test_a_crash_leaves_no_mixture_of_two_models(model, other, folder, monkeypatch):
    monkeypatch.setattr("customize.references.write_model._restore", lambda *_: None)
    expected = {model.digest, other.digest}
    refused = 0
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            fail_at(patch, number)
            try:
                other.save_pretrained(folder)
                break
            except StorageError:
                pass
        try:
            assert ReferenceModel.from_pretrained(folder).digest in expected
        except ConceptError as error:
            assert "saving it was interrupted" in str(error)
            refused += 1
        assert (folder / "encoder" / "notes.txt").read_text() == "mine"
        model.save_pretrained(folder)
    assert refused > 8
    assert ReferenceModel.from_pretrained(folder).digest == other.digest
    half = ReferenceModel.from_pretrained(other.save_pretrained(folder, torch.float16))
    assert {p.dtype for p in half.adapter.parameters()} == {torch.float32}
