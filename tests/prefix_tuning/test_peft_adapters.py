"""Adapters that PEFT wrote give PEFT's outputs here, and prefixes written for PEFT give ours there; what cannot is refused."""

import copy
import json
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from prefix_tuning import Prefix, attach_prefix
from prefix_tuning.peft_adapters import AdapterLayout, write_adapter
from prefix_tuning.shapes import ModelShape
from support.encoder_decoders import labels, source, tiny_encoder_decoder
from support.encoders import inputs_of, logits_of, tiny_encoder
from support.models import FAMILIES, random_prefix, tiny_model
from support.peft_models import KINDS, PREFIX_LEN, TOLERANCE, generated, ids, name_the_cache, padding, peft_model

peft = pytest.importorskip("peft")


def assert_same_outputs(model, prefix, rival):
    """`model` with `prefix` against the PeftModel `rival`: logits, also of left-padded rows, greedy and beam tokens."""
    mask = padding()
    if model.config.model_type == "mistral":  # PEFT counts padding to the window
        mask[:] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attach_prefix(model, prefix, prefix_window="peft"):
        for given in ({}, {"attention_mask": mask, "position_ids": positions}):
            got, expected = (side(input_ids=ids(), **given).logits for side in (model, rival))
            real = mask.bool() if given else torch.ones_like(mask).bool()
            torch.testing.assert_close(got[real], expected[real], **TOLERANCE)
        for options in ({}, {"num_beams": 3}):
            assert torch.equal(generated(model, mask, **options), generated(rival, mask, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_peft_give_its_logits_and_tokens(family, kind, tmp_path):
    model = tiny_model(family)
    rival = peft_model(copy.deepcopy(model), PREFIX_LEN, **KINDS[kind])
    rival.save_pretrained(tmp_path)
    prefix = Prefix.from_peft(tmp_path)
    assert prefix.prefix_len == prefix.position_offset == PREFIX_LEN
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in prefix.parameters())
    assert_same_outputs(model, prefix, rival)
    of_model = Prefix.from_peft(rival)
    for mine, other in zip(of_model.parameters(), prefix.parameters(), strict=True):
        assert torch.equal(mine, other)
    with torch.no_grad():
        next(of_model.parameters()).zero_()  # a copy: PEFT's own parameters stay
    assert rival.prompt_encoder["default"].embedding.weight.abs().min() > 0


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapters_give_the_same_outputs_in_peft(family, reparametrization, tmp_path):
    model = tiny_model(family)
    prefix = random_prefix(model, PREFIX_LEN)
    if reparametrization:
        prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=16, seed=0)
    prefix.to_peft(tmp_path)
    rival = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    name_the_cache(rival)
    assert_same_outputs(model, prefix, rival)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_keeps_every_number(kind, tmp_path):
    rival = peft_model(tiny_model("llama"), PREFIX_LEN, **KINDS[kind])
    rival.save_pretrained(tmp_path / "peft")
    prefix = Prefix.from_peft(tmp_path / "peft")
    prefix.to_peft(tmp_path / "back")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert list(first) == list(second) == ["prompt_embeddings"]
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])
    again = Prefix.from_peft(tmp_path / "back")
    assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), again.parameters(), strict=True))
    if kind == "flat":
        written, ours = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "back"))
        assert {name: written[name] for name in ours} == ours


def test_a_loaded_adapter_is_trained_on(tmp_path):
    model = tiny_model("llama")
    peft_model(copy.deepcopy(model), PREFIX_LEN).save_pretrained(tmp_path)
    prefix = Prefix.from_peft(tmp_path)
    with attach_prefix(model, prefix):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in prefix.parameters())


def test_the_active_adapter_of_several_is_taken():
    rival = peft_model(tiny_model("llama"), PREFIX_LEN)
    rival.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert Prefix.from_peft(rival).prefix_len == PREFIX_LEN
    rival.set_adapter("other")
    assert Prefix.from_peft(rival).prefix_len == 3


def test_older_adapters_are_pickled(tmp_path):
    rival = peft_model(tiny_model("llama"), PREFIX_LEN)
    rival.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.safetensors"))
    prefix = Prefix.from_peft(tmp_path, dtype=torch.float64, device="meta")
    assert {(p.dtype, p.device.type) for p in prefix.parameters()} == {(torch.float64, "meta")}
    Prefix.from_peft(tmp_path).to_peft(tmp_path)
    assert not list(tmp_path.glob("*.bin"))  # which PEFT would never read beside the new file


def test_from_the_hub(tmp_path, monkeypatch):
    asked = []
    peft_model(tiny_model("llama"), PREFIX_LEN).save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **kwargs: asked.append((args, kwargs)) or tmp_path)
    assert Prefix.from_peft("someone/adapter").prefix_len == PREFIX_LEN
    names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
    Prefix.from_peft("someone/adapter", revision="v2")
    assert asked == [(("someone/adapter",), {"revision": revision, "allow_patterns": names}) for revision in (None, "v2")]


# Sequence-to-sequence


def by_number(layers, prefix_len=2):
    """Layers whose keys hold twice their number, and whose values one more."""
    return [tuple(torch.full((2, prefix_len, 4), 2.0 * index + part) for part in (0, 1)) for index in range(layers)]


@pytest.mark.parametrize("layers, read", ((3, [0, 2, 1]), (4, [0, 2, 0, 2]), (6, [0, 2, 4, 0, 2, 4])))
def test_sequence_to_sequence_layers_are_those_that_peft_reads(layers, read):
    import transformers

    shape = ModelShape(layers, 2, 4, 4)
    flat = torch.arange(layers * 2.0).repeat_interleave(8).expand(2, -1)
    split = AdapterLayout(2, shape, seq2seq=True).split(flat)
    assert [int(key[0, 0, 0]) // 2 for key, _ in split] == read
    assert all(torch.equal(value, key + 1) for key, value in split)
    config = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=layers, num_decoder_layers=layers, num_heads=2
    )
    rival = peft_model(transformers.T5ForConditionalGeneration(config), 2, task_type="SEQ_2_SEQ_LM")
    with torch.no_grad():
        rival.prompt_encoder["default"].embedding.weight.copy_(flat)
    cache = rival.get_prompt(1).self_attention_cache
    for (key, value), layer in zip(split, cache.layers, strict=True):
        assert torch.equal(layer.keys[0], key) and torch.equal(layer.values[0], value)
    assert all(torch.equal(a, b) for a, (b, _) in zip(Prefix.from_peft(rival).keys["decoder"], split, strict=True))


def test_sequence_to_sequence_export(tmp_path):
    write_adapter(tmp_path / "odd", by_number(3), {}, "", "SEQ_2_SEQ_LM")
    back = Prefix.from_peft(tmp_path / "odd")
    assert all(torch.equal(key, expected) for key, (expected, _) in zip(back.keys["decoder"], by_number(3), strict=True))
    write_adapter(tmp_path / "even", by_number(2) * 2, {}, "", "SEQ_2_SEQ_LM")
    back = Prefix.from_peft(tmp_path / "even")
    assert all(torch.equal(key, expected) for key, (expected, _) in zip(back.keys["decoder"], by_number(2) * 2, strict=True))
    with pytest.raises(NotImplementedError, match="layers 0 and 2 of 4 read the same stored layer"):
        write_adapter(tmp_path / "differ", by_number(4), {}, "", "SEQ_2_SEQ_LM")
    assert not (tmp_path / "differ").exists()


# Heads, encoders, encoder-decoders

CLASSIFIERS = [
    (name, task, task_type)
    for name in ("bert", "electra", "roberta")
    for task, task_type in (
        ("SequenceClassification", "SEQ_CLS"), ("TokenClassification", "TOKEN_CLS"), ("QuestionAnswering", "QUESTION_ANS")
    )
]  # fmt: skip


@pytest.mark.parametrize("name, task, task_type", CLASSIFIERS)
def test_adapters_of_encoders_bring_their_heads(name, task, task_type, tmp_path):
    model = tiny_encoder(name, task)
    rival = peft_model(copy.deepcopy(model), PREFIX_LEN, task_type=task_type)
    with torch.no_grad():
        for parameter in rival.parameters():
            if parameter.requires_grad:  # the head, no longer the model's own
                parameter.copy_(torch.randn(parameter.shape))
    rival.save_pretrained(tmp_path / "peft")
    inputs = {name: tensor for name, tensor in inputs_of(model, "right").items() if name in ("input_ids", "attention_mask")}
    expected = logits_of(rival(**inputs))
    real = slice(None) if task_type == "SEQ_CLS" else inputs["attention_mask"].bool()
    for adapter in (rival, tmp_path / "peft"):
        prefix = Prefix.from_peft(adapter, part="encoder")
        assert list(prefix.heads) == ["qa_outputs" if task_type == "QUESTION_ANS" else "classifier"]
        with attach_prefix(model, prefix):
            torch.testing.assert_close(logits_of(model(**inputs))[real], expected[real], **TOLERANCE)
    prefix.to_peft(tmp_path / "ours", task_type=task_type)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    name_the_cache(loaded)
    torch.testing.assert_close(logits_of(loaded(**inputs))[real], expected[real], **TOLERANCE)
    with pytest.raises(NotImplementedError, match="the decoder's, .*, got encoder for task_type SEQ_2_SEQ_LM"):
        prefix.to_peft(tmp_path / "wrong", task_type="SEQ_2_SEQ_LM")
    scored = LlamaForSequenceClassification(tiny_model("llama").config).eval()
    with pytest.raises(
        ValueError, match="task_type: expected one of QUESTION_ANS, SEQ_CLS.* for a prefix with score, got CAUSAL_LM"
    ):
        Prefix.for_model(scored, 3).to_peft(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    types = "FEATURE_EXTRACTION, QUESTION_ANS, SEQ_CLS, TOKEN_CLS"
    with pytest.raises(ValueError, match=f"task_type: expected one of {types}.* for an encoder's prefix, got CAUSAL_LM"):
        prefix.to_peft(tmp_path / "wrong", task_type="CAUSAL_LM")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("layers", (3, 4))
@pytest.mark.parametrize("name", ("bart", "t5"))
def test_adapters_of_encoder_decoders_give_pefts_logits(name, layers, tmp_path):
    sizes = {"num_layers": layers, "num_decoder_layers": layers, "d_kv": 8}
    if name == "bart":
        sizes = {"encoder_layers": layers, "decoder_layers": layers, "decoder_attention_heads": 4}
    model = tiny_encoder_decoder(name, **sizes)
    rival = peft_model(copy.deepcopy(model), PREFIX_LEN, task_type="SEQ_2_SEQ_LM")
    rival.save_pretrained(tmp_path)
    inputs = source(model, side="right") | {"labels": labels()}
    prefix = Prefix.from_peft(tmp_path)
    with attach_prefix(model, prefix):
        got = model(**inputs)
    expected = rival(**inputs)
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    assert (got.logits - model(**inputs).logits).abs().max() > 1e-2


# What is refused


def test_exports_that_peft_cannot_express(tmp_path):
    layers = by_number(3)
    narrow = [(key, value[..., :3]) for key, value in layers]
    for prefix, message in (
        (Prefix({"decoder": layers}, position_offset=0), "expected position_offset 2, the prefix_len, .*, got 0"),
        (Prefix({"decoder": layers, "cross": layers}), "of a single self-attention, .*, got decoder, cross for"),
        (Prefix({"decoder": narrow}), "got 3 layers, 2 kv_heads, head_dim 4, value_dim 3"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            prefix.to_peft(tmp_path / "adapter")
    with pytest.raises(ValueError, match="task_type: expected one of CAUSAL_LM.*, got 'chat'"):
        Prefix({"decoder": layers}).to_peft(tmp_path / "adapter", task_type="chat")
    assert not (tmp_path / "adapter").exists()


def test_other_adapters_are_refused(tmp_path):
    lora = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    for adapter in (tmp_path / "lora", lora):
        with pytest.raises(NotImplementedError, match="expected an adapter of type PREFIX_TUNING or CARTRIDGE, got LORA"):
            Prefix.from_peft(adapter)
    with pytest.raises(TypeError, match="expected a folder or a PeftModel with an active adapter, got LlamaForCausalLM"):
        Prefix.from_peft(tiny_model("llama"))
    with pytest.raises(FileNotFoundError, match="expected a folder or a hub repository in reach, got neither"):
        Prefix.from_peft("/nowhere/adapter")


def test_adapters_in_folders_below_are_named(tmp_path):
    model = peft_model(tiny_model("llama"), PREFIX_LEN)
    for name in ("one", "two"):
        model.add_adapter(name, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    model.save_pretrained(tmp_path, selected_adapters=["one", "two"])
    (tmp_path / "other").mkdir()
    message = f"adapter_config.json: .* PEFT saves, got no such file; there is one in {tmp_path / 'one'}, {tmp_path / 'two'}$"
    with pytest.raises(FileNotFoundError, match=message):
        Prefix.from_peft(tmp_path)
    assert Prefix.from_peft(tmp_path / "two").prefix_len == 3


def change(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_damaged_adapters_name_the_file(tmp_path):
    random_prefix(tiny_model("llama")).to_peft(tmp_path)
    tensors = tmp_path / "adapter_model.safetensors"
    change(tmp_path, num_layers=4)
    with pytest.raises(ValueError, match=r"safetensors: expected prompt_embeddings of floats \[5, 256\] .*, got .*\[5, 192\]"):
        Prefix.from_peft(tmp_path)
    change(tmp_path, num_layers=None)
    with pytest.raises(ValueError, match="adapter_config.json: .*num_layers: expected an int, got None"):
        Prefix.from_peft(tmp_path)
    change(tmp_path, num_layers=3, num_attention_heads=3)
    with pytest.raises(ValueError, match="token_dim: expected a multiple of num_attention_heads, 3, got 32"):
        Prefix.from_peft(tmp_path)
    change(tmp_path, num_attention_heads=2, num_transformer_submodules=2)
    with pytest.raises(NotImplementedError, match="num_transformer_submodules: expected 1 for task_type CAUSAL_LM, got 2"):
        Prefix.from_peft(tmp_path)
    change(tmp_path, num_transformer_submodules=1)
    tensors.write_bytes(b"{}")
    with pytest.raises(ValueError, match="adapter_model.safetensors: damaged"):
        Prefix.from_peft(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: .*, got no such file"):
        Prefix.from_peft(tmp_path)
    for content in (b"", b"hello", pickle.dumps({"prompt_embeddings": Path("x")})):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match="adapter_model.bin: damaged"):
            Prefix.from_peft(tmp_path)
    for content in ([1], {"prompt_embeddings": 3}, {5: torch.ones(1)}):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(ValueError, match="adapter_model.bin: expected the tensors .* by their names, got another"):
            Prefix.from_peft(tmp_path)
    for wrong in ({"base_model_name_or_path": 3}, {"modules_to_save": "score"}, {"modules_to_save": [None]}):
        change(tmp_path, **{"base_model_name_or_path": None, "modules_to_save": None} | wrong)
        with pytest.raises(ValueError, match=f"adapter_config.json: .*{next(iter(wrong))}: expected .*, got"):
            Prefix.from_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="adapter_config.json: expected the JSON of a PEFT adapter .*recursion"):
        Prefix.from_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json: expected the JSON of a PEFT adapter"):
        Prefix.from_peft(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_config.json: .*, got no such file"):
        Prefix.from_peft(tmp_path)


def test_what_is_neither_prefix_nor_head_is_refused(tmp_path):
    random_prefix(tiny_model("llama")).to_peft(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {"base_model.score.weight": torch.zeros(2, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotImplementedError, match="the modules_to_save .*, got base_model.score.weight"):
        Prefix.from_peft(tmp_path)


def test_files_are_written_whole(tmp_path, monkeypatch):
    prefix = random_prefix(tiny_model("llama"))
    prefix.to_peft(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & stat.S_IRUSR

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("prefix_tuning.peft_adapters.json.dumps", fail)
    with torch.no_grad():
        next(prefix.parameters()).zero_()
    with pytest.raises(OSError, match="disk full"):
        prefix.to_peft(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
