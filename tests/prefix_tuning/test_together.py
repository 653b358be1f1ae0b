"""A prefix together with other libraries: LoRA, quantised weights, models on several devices, TRL, the hub."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload
from transformers import DynamicCache

from prefix_kernels import prefix_attention
from prefix_tuning import Prefix, accelerate_peft, attach_prefix
from prefix_tuning.devices import execution_device
from prefix_tuning.evaluate import mean_loss
from prefix_tuning.generate import generate_texts
from support.encoders import inputs_of, tiny_encoder
from support.models import dispatched, random_prefix, tiny_model
from support.peft_models import PREFIX_LEN, TOLERANCE, generated, ids, peft_model, twins
from support.tokenizer import tiny_tokenizer


def past_key_values_loss(model, prefix):
    """The loss with the prefix as PEFT would give it: copied for each row into a cache."""
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(prefix.layers()):
        cache.update(key.to(model.dtype).expand(2, -1, -1, -1), value.to(model.dtype).expand(2, -1, -1, -1), index)
    positions = torch.arange(7)[None].expand(2, -1) + PREFIX_LEN
    mask = torch.ones(2, PREFIX_LEN + 7, dtype=torch.long)
    given = {"input_ids": ids(), "labels": ids(), "attention_mask": mask, "position_ids": positions}
    return model(**given, past_key_values=cache).loss


def trained(*modules):
    return {name: p for module in modules for name, p in module.named_parameters() if p.requires_grad}


# LoRA


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_model("llama"), config).eval()


def test_lora_and_prefix_are_trained_together(lora):
    prefix = random_prefix(tiny_model("llama"), PREFIX_LEN)
    parameters = trained(lora, prefix)
    expected = torch.autograd.grad(past_key_values_loss(lora.get_base_model(), prefix), list(parameters.values()))
    with attach_prefix(lora, prefix):
        losses = [lora(input_ids=ids(), labels=ids()).loss]
        grads = torch.autograd.grad(losses[0], list(parameters.values()))
        for name, grad, reference in zip(parameters, grads, expected, strict=True):
            torch.testing.assert_close(grad, reference, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
            assert grad.abs().max() > 1e-5, name
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            losses.append(lora(input_ids=ids(), labels=ids()).loss)
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0] - 0.1
        tokens = generated(lora)
        with lora.disable_adapter():
            prefix_alone = lora(input_ids=ids()).logits
    merged = lora.merge_and_unload()
    with attach_prefix(merged, prefix):
        assert torch.equal(generated(merged), tokens)
    plain = tiny_model("llama")
    with attach_prefix(plain, prefix):
        torch.testing.assert_close(plain(input_ids=ids()).logits, prefix_alone, **TOLERANCE)


def test_a_prefix_made_for_a_model_with_lora(lora):
    prefix = Prefix.for_model(lora, 4, init="text", text="a pub by the river", tokenizer=tiny_tokenizer())
    of_text = Prefix.from_text(lora.get_base_model(), None, input_ids=tiny_tokenizer()("a pub by the river")["input_ids"][:4])
    assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), of_text.parameters(), strict=True))


# Models on several devices


def test_weights_offloaded_to_disk(tmp_path):
    model = tiny_model("llama")
    split = dispatched(model, tmp_path, ("disk", "cpu", "disk"))
    assert {parameter.device.type for parameter in split.parameters()} == {"cpu", "meta"}
    assert next(split.model.layers[0].parameters()).is_meta
    rival, accelerated = twins(model, PREFIX_LEN)
    prefix = Prefix.from_peft(rival)
    with attach_prefix(split, prefix):
        out = split(input_ids=ids(), labels=ids())
        out.loss.backward()
        tokens = generated(split)
    expected = rival(input_ids=ids(), labels=ids())
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, **TOLERANCE)
    flat = torch.stack([tensor.grad for pair in prefix.layers() for tensor in pair]).permute(2, 0, 1, 3).flatten(1)
    torch.testing.assert_close(flat, rival.prompt_encoder["default"].embedding.weight.grad, **TOLERANCE)
    assert torch.equal(tokens, generated(rival))
    accelerated = peft_model(dispatched(model, tmp_path / "again", ("cpu", "disk", "disk")), PREFIX_LEN)
    accelerated.prompt_encoder.load_state_dict(rival.prompt_encoder.state_dict())
    torch.testing.assert_close(accelerate_peft(accelerated)(input_ids=ids()).logits, expected.logits, **TOLERANCE)


def test_what_is_made_for_a_model_whose_weights_lie_elsewhere():
    plain, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model = cpu_offload(copy.deepcopy(plain))
    assert next(model.parameters()).is_meta
    made = []
    for one in (plain, model):
        text = Prefix.from_text(one, tokenizer, "Be brief.\n")
        start = Prefix.for_model(one, 4, init="text", text="a pub by the river", tokenizer=tokenizer)
        drawn = Prefix.for_model(one, 4, seed=0)
        with attach_prefix(one, text):
            texts = generate_texts(one, tokenizer, ["a", "b c"], max_new_tokens=5)
            loss = mean_loss(one, tokenizer, [{"prompt": "a", "completion": "b"}])
        made.append((texts, loss, [tensor for prefix in (text, start, drawn) for tensor in prefix.parameters()]))
    assert made[0][:2] == made[1][:2] and all(map(torch.equal, made[0][2], made[1][2]))


def test_the_head_of_a_model_whose_weights_lie_elsewhere_is_its_own_again():
    model = tiny_encoder("bert").bfloat16()
    inputs, prefix = inputs_of(model), Prefix.for_model(model, PREFIX_LEN)
    expected = model(**inputs).logits
    model = cpu_offload(model.requires_grad_(False))
    with attach_prefix(model, prefix):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_each_layer_s_prefix_comes_to_where_the_layer_computes(monkeypatch):
    """A device without memory stands in for a second one."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    places = ["cpu", "meta", "meta"]
    model = tiny_model("llama")
    for module, device in zip((*model.model.layers, model.model.norm, model.lm_head), (*places, "meta", "meta"), strict=True):
        add_hook_to_module(module.to(device), AlignDevicesHook(device))
    assert [execution_device(layer.self_attn).type for layer in model.model.layers] == places
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization="mlp", hidden_size=8, seed=0)
    accelerated = accelerate_peft(peft_model(copy.deepcopy(model), PREFIX_LEN))
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    seen = []

    def attention(query, key, value, prefix_key, prefix_value, **options):
        seen.append((prefix_key.device.type, prefix_value.device.type))
        return prefix_attention(query, key, value, prefix_key, prefix_value, **options)

    monkeypatch.setattr("prefix_tuning.attention.prefix_attention", attention)
    with attach_prefix(model, prefix):
        for side in (model, accelerated):
            assert side(input_ids=ids(), attention_mask=mask).logits.shape == (2, 7, 128)
    assert seen == [(place, place) for place in places] * 2


# Quantised weights


@pytest.mark.parametrize("bits", (8, 4))
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    assert f"{bits}bit" in type(model.model.layers[0].self_attn.q_proj).__name__.replace("8bitLt", "8bit")
    model.train()  # on some CPUs bitsandbytes' 4-bit layers hand on no gradients in eval mode
    prefix = random_prefix(model, PREFIX_LEN)
    parameters = list(prefix.parameters())
    loss = past_key_values_loss(model, prefix)
    expected = torch.autograd.grad(loss, parameters)
    with attach_prefix(model, prefix):
        got = model(input_ids=ids(), labels=ids()).loss
        grads = torch.autograd.grad(got, parameters)
        model.eval()
        assert generated(model).shape == (2, 13)
    torch.testing.assert_close(got, loss, atol=1e-3, rtol=1e-3)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-3, rtol=1e-2)
        assert grad.abs().max() > 1e-3


# TRL


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_trl_s_supervised_fine_tuning(family, tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": ids(1, 5 + index % 4, seed=index)[0].tolist()} for index in range(12)]

    def losses(model, **options):
        args = SFTConfig(
            tmp_path, max_steps=4, per_device_train_batch_size=3, learning_rate=0.05, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **options,
        )  # fmt: skip
        data = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
        trainer = SFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain = tiny_model(family, **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {})
    expected = losses(peft_model(copy.deepcopy(plain), PREFIX_LEN), gradient_checkpointing=False)
    assert len(expected) == 4 and len(set(expected)) == 4
    ways = [{}, {"gradient_checkpointing": False}]  # checkpointing is TRL's default
    if family == "llama":  # for GPT-2, TRL divides the loss of rows without padding by another count
        ways.append({"padding_free": True})
    for options in ways:
        model = accelerate_peft(peft_model(copy.deepcopy(plain), PREFIX_LEN))
        assert losses(model, **options) == pytest.approx(expected, rel=1e-4)


# The hub, without a network


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the hub: its repositories are folders."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, revision, allow_patterns):
        cached = tmp_path / "cache" / repo_id
        cached.mkdir(parents=True)
        for name in allow_patterns:
            if (root / repo_id / name).exists():
                shutil.copy(root / repo_id / name, cached)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return root


def test_to_the_hub_and_back_by_id(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    prefix = random_prefix(tiny_model("llama"), PREFIX_LEN)
    prefix.push_to_hub("someone/prefix")
    assert {file.name for file in (hub / "someone" / "prefix").iterdir()} == {"prefix.safetensors", "prefix_config.json"}
    loaded = Prefix.load("someone/prefix")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), prefix.parameters(), strict=True))
    prefix.to_peft(hub / "someone" / "adapter")
    loaded = Prefix.from_peft("someone/adapter")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), prefix.parameters(), strict=True))


# Trainer's best checkpoint, of a model that PEFT and transformers' own Trainer train


def test_the_best_checkpoint_of_an_accelerated_model(tmp_path):
    peft = pytest.importorskip("peft")
    rows, others = ([{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids(6, 8, seed)] for seed in (1, 2))
    model = accelerate_peft(peft_model(tiny_model("llama"), PREFIX_LEN))
    args = transformers.TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=3, learning_rate=3.0, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", report_to=[],
        use_cpu=True, label_names=["labels"], lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=others)
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{seen.index(min(seen)) + 1}" and min(seen) < seen[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-5)
    again = peft.PeftModel.from_pretrained(tiny_model("llama"), best)
    torch.testing.assert_close(again(input_ids=ids()).logits, model(input_ids=ids()).logits, **TOLERANCE)
    prefix = Prefix.from_peft(best)
    assert all(torch.equal(a, b) for a, b in zip(prefix.parameters(), Prefix.from_peft(model).parameters(), strict=True))
