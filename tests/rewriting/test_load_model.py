"""Loading language models from folders, GGUF files and LoRAs, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from customize.errors import ConceptError, ConfigError
from customize.rewriting.instructions import Instructions
from customize.rewriting.language_model import Chat, Message, Sampling
from customize.rewriting.load_model import (
    SETTINGS_FILE,
    TrainedSettings,
    load_model,
    write_settings,
)
from customize.rewriting.local_model import LocalModel
from customize.storybook.bundled_assets import assets_folder
from tests.tiny_rewriter import save_tiny_llama, tiny_llama, tiny_llama_tokenizer

CHAT = Chat((Message("user", "a dog"),))
GREEDY = Sampling(0.0, 12)


def answer(model: LocalModel) -> str:
    return model.complete([CHAT], GREEDY)[0].text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def save_lora(folder, base):
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return LocalModel(model.merge_and_unload(), tiny_llama_tokenizer(), "merged")


def test_a_folder_is_loaded(folder):
    model, settings = load_model(folder)
    assert answer(model) == answer(LocalModel(tiny_llama(), tiny_llama_tokenizer(), "tiny"))
    assert settings == TrainedSettings()
    assert model.model.dtype == torch.float32
    half, _ = load_model(folder, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16


def test_settings_of_the_training_are_read(copied):
    settings = TrainedSettings(Instructions("", "Say {prompt} better"), 33)
    (copied / SETTINGS_FILE).write_text(write_settings(settings))
    assert load_model(copied)[1] == settings
    (copied / SETTINGS_FILE).write_text('{"sytem": "x"}')
    with pytest.raises(ConceptError, match="other fields than"):
        load_model(copied)


def test_a_lora_is_merged_into_the_base_that_it_names(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    expected = save_lora(tmp_path / "lora", str(folder))
    assert answer(load_model(tmp_path / "lora")[0]) == answer(expected)
    assert answer(expected) != answer(load_model(folder)[0])
    save_lora(tmp_path / "other", "no/such-model")
    with pytest.raises(ConceptError, match="cannot be loaded"):
        load_model(tmp_path / "other")
    assert answer(load_model(tmp_path / "other", base=folder)[0]) == answer(expected)


def test_base_is_refused_for_a_whole_model(folder):
    with pytest.raises(ConfigError, match="belongs to a LoRA"):
        load_model(folder, base=folder)


def test_a_lora_of_another_width_is_refused(folder, tmp_path):
    save_lora(tmp_path / "lora", str(folder))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    config["r"] = 4
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConceptError, match="does not fit its base model"):
        load_model(tmp_path / "lora")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_damaged_files_are_refused(copied, name):
    content = (copied / name).read_bytes()
    (copied / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ConceptError, match="cannot be loaded"):
        load_model(copied)
    (copied / name).unlink()
    if name != "tokenizer.json":  # built from the other files of a tokenizer
        with pytest.raises(ConceptError):
            load_model(copied)


def test_pickles_are_refused(copied):
    (copied / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), copied / "pytorch_model.bin")
    with pytest.raises(ConceptError, match="pickle"):
        load_model(copied)


def test_missing_weights_are_refused(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConceptError, match=r"lacks 1 weight, such as model.norm.weight"):
        load_model(copied)


def test_other_models_and_paths_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "none", tmp_path / "empty", "smollm9"):
        with pytest.raises(ConceptError):
            load_model(source)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="neither a folder nor a GGUF file"):
        load_model(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConceptError, match="cannot be loaded"):
        load_model(tmp_path / "model.gguf")


def test_messages_about_wrong_folders_are_whole(folder, copied, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "bare")
    for path, problem in (
        (tmp_path / "empty", "neither config.json nor adapter_config.json"),
        (tmp_path / "bare", "a model without a tokenizer"),
        (assets_folder() / "storybook", "an image pipeline of diffusers, and no language model"),
    ):
        with pytest.raises(ConceptError, match=problem):
            load_model(path)
    (copied / "tokenizer.json").write_text("{}")
    (copied / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConceptError) as caught:
        load_model(copied)
    assert not caught.value.problem.endswith(":")


def test_a_model_that_was_not_downloaded_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("CUSTOMIZE_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="make llm"):
        load_model("smollm2-135m-instruct")
    save_tiny_llama(tmp_path / "smollm2-135m-instruct")
    assert answer(load_model("smollm2-135m-instruct")[0])


def write_gguf(path, architecture="llama"):
    """Write the tiny Llama as a GGUF file, with llama.cpp's names."""
    import gguf

    model, tokenizer = tiny_llama(), tiny_llama_tokenizer()
    config, vocab = model.config, tokenizer.get_vocab()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocab, key=vocab.__getitem__))
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([3 if name in special else 1 for name in sorted(vocab, key=vocab.get)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.v_proj": "attn_v",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "model.layers.": "blk.",
    }
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue  # tied
        if "q_proj" in key or "k_proj" in key:  # llama.cpp's order of rotary pairs
            heads = config.num_attention_heads
            rows, columns = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2)
            tensor = tensor.reshape(rows, columns)
        for old, new in names.items():
            key = key.replace(old, new)
        writer.add_tensor(key, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_loaded_and_can_be_saved(folder, tmp_path):
    model, _ = load_model(write_gguf(tmp_path / "tiny.gguf"))
    assert answer(model) == answer(load_model(folder)[0])
    model.model.half().save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match="quantized already"):
        load_model(tmp_path / "tiny.gguf", load_in_4bit=True)


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path):
    with pytest.raises(ConceptError, match="cannot be loaded"):
        load_model(write_gguf(tmp_path / "tiny.gguf", "hyperllama"))


def test_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    # On CPUs with AVX-512 bitsandbytes multiplies widths that are multiples of 32 alone.
    model, _ = load_model(save_tiny_llama(tmp_path, width=64), load_in_4bit=True)
    assert model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert model.complete([CHAT], GREEDY)
