import resource
import warnings

import pytest
import torch

from customize.errors import StorageError, TrainingError
from customize.training.checkpoint import (
    Checkpoint,
    check_settings_match,
    delete_checkpoints,
    load_latest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    settings_differences,
)


def made(step, **settings):
    tensors = {"adapter/unet/0": torch.full((3, 2), float(step)), "tokens/x": torch.ones(1)}
    return Checkpoint(step, tensors, settings, [[step, 0.5]], {"scaler": {}})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path):
    save_checkpoint(tmp_path / "new" / "folder", made(7, rank=4, text=None), keep=2)
    loaded = load_latest_checkpoint(tmp_path / "new" / "folder")
    assert (loaded.step, loaded.settings, loaded.history) == (
        7,
        {"rank": 4, "text": None},
        [[7, 0.5]],
    )
    assert loaded.extra == {"scaler": {}}
    assert torch.equal(loaded.tensors["adapter/unet/0"], torch.full((3, 2), 7.0))


def test_only_the_newest_are_kept_and_partial_files_are_deleted(tmp_path):
    (tmp_path / ".step-000001.safetensors.123").write_bytes(b"half")
    for step in (5, 20, 1_000_000):
        save_checkpoint(tmp_path, made(step), keep=2)
    assert names(tmp_path) == ["step-000020.safetensors", "step-1000000.safetensors"]
    assert load_latest_checkpoint(tmp_path).step == 1_000_000
    delete_checkpoints(tmp_path)
    assert load_latest_checkpoint(tmp_path) is None and names(tmp_path) == []
    assert load_latest_checkpoint(tmp_path / "missing") is None


def test_a_damaged_file_of_a_later_step_is_deleted(tmp_path):
    save_checkpoint(tmp_path, made(5), keep=1)
    (tmp_path / "step-000020.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, made(10), keep=1)
    assert names(tmp_path) == ["step-000010.safetensors"]


def test_partial_and_damaged_files_are_skipped(tmp_path):
    save_checkpoint(tmp_path, made(10), keep=3)
    save_checkpoint(tmp_path, made(20), keep=3)
    (tmp_path / ".step-000030.safetensors.99").write_bytes(b"half")
    path = tmp_path / "step-000020.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:20], b"", b"\xff" * 64):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=r"step-000020.safetensors is damaged"):
            assert load_latest_checkpoint(tmp_path).step == 10
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_latest_checkpoint(tmp_path).step == 20


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    save_checkpoint(tmp_path, made(1), keep=1)
    bad = made(2)
    bad.tensors["tokens/x"][0] = float("nan")
    with pytest.raises(TrainingError, match=r"step 2.*no longer finite"):
        save_checkpoint(tmp_path, bad, keep=1)
    assert names(tmp_path) == ["step-000001.safetensors"]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    save_checkpoint(tmp_path, made(1), keep=1)
    large = made(2)
    large.tensors["adapter/unet/0"] = torch.zeros(100_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"step 2 cannot be written.*free some space"):
            save_checkpoint(tmp_path, large, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-000001.safetensors"]
    assert load_latest_checkpoint(tmp_path).step == 1


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "folder", made(1), keep=1)


def test_differing_settings_are_named():
    before, now = {"rank": 4, "a": (1, 2), "old": 1}, {"rank": 8, "a": [1, 2], "new": None}
    assert settings_differences(before, {**before, "a": [1, 2]}) == ["a was (1, 2) and is [1, 2]"]
    assert settings_differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    checkpoint = Checkpoint(3, {}, {"rank": 4, "old": 1})
    check_settings_match(checkpoint, {"rank": 4, "old": 1}, "here")
    with pytest.raises(TrainingError) as caught:
        check_settings_match(checkpoint, now, "here")
    assert "rank was 4 and is 8" in str(caught.value)
    assert "old was 1 and is 'not set'" in str(caught.value)


def test_a_restored_optimizer_continues_bit_for_bit():
    def parameters():
        torch.manual_seed(0)
        return {"a": torch.nn.Parameter(torch.randn(4)), "b": torch.nn.Parameter(torch.randn(2, 2))}

    def step(named, optimizer, times):
        for _ in range(times):
            sum((p**3).sum() for p in named.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = parameters()
    optimizer = torch.optim.AdamW(whole.values(), lr=0.1, fused=True)
    step(whole, optimizer, 3)
    state = {k: v.clone() for k, v in optimizer_tensors(optimizer, whole).items()}
    values = {k: p.detach().clone() for k, p in whole.items()}
    step(whole, optimizer, 3)

    resumed = parameters()
    with torch.no_grad():
        for key, p in resumed.items():
            p.copy_(values[key])
    other = torch.optim.AdamW(resumed.values(), lr=0.1, fused=True)
    restore_optimizer(other, resumed, state)
    step(resumed, other, 3)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
