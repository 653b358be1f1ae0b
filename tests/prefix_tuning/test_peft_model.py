"""An accelerated PeftModel stays the object that it was: its adapters and files, copies, the way back. What is refused."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefix_tuning import Prefix, accelerate_peft, attach_prefix, restore_peft
from support.models import random_prefix, tiny_model
from support.peft_models import (
    KINDS,
    PREFIX_LEN,
    TOLERANCE,
    assert_same_gradients,
    generated,
    gradients,
    ids,
    padding,
    peft_model,
    twins,
)

peft = pytest.importorskip("peft")


# Adapters


def test_adapters_are_switched_added_and_disabled(pair, family):
    rival, model = pair
    plain = tiny_model(family)(input_ids=ids()).logits
    for side in pair:
        torch.manual_seed(7)
        side.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for name in ("other", "default", "other"):
        for side in pair:
            side.set_adapter(name)
        expected, got = (side(input_ids=ids()).logits for side in pair)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        assert torch.equal(generated(model), generated(rival))
        with model.disable_adapter(), rival.disable_adapter():
            assert torch.equal(generated(model), generated(rival))
            torch.testing.assert_close(model(input_ids=ids()).logits, plain, **TOLERANCE)
            left = {"input_ids": ids(), "attention_mask": padding()}  # as the plain model, also where that needs positions
            torch.testing.assert_close(model(**left).logits, rival(**left).logits, **TOLERANCE)
        torch.testing.assert_close(model(input_ids=ids()).logits, expected, **TOLERANCE)
    torch.testing.assert_close(model.get_base_model()(input_ids=ids()).logits, plain, **TOLERANCE)
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, **TOLERANCE)
    for side in pair:
        side.delete_adapter("other")
    torch.testing.assert_close(model(input_ids=ids()).logits, rival(input_ids=ids()).logits, **TOLERANCE)


@pytest.mark.parametrize("kind", ["flat", "projection"])
def test_another_adapter_without_gradients_before_the_backward_pass(kind):
    """As the reference of DPO runs: layers are recomputed with the prefix of the pass that is differentiated."""
    found = []
    for other in (False, True):
        model = accelerate_peft(peft_model(tiny_model("llama"), **KINDS[kind])).train()
        model.add_adapter("ref", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        if other:
            with torch.no_grad():
                model.set_adapter("ref")
                model(input_ids=ids(), use_cache=False)
                model.set_adapter("default")
        found.append(gradients(model, loss))
    assert found[0] and all(torch.equal(found[1][name], grad) for name, grad in found[0].items() if grad is not None)


def test_another_adapter_within_generate(pair):
    """As two are contrasted; each has its own prefix."""
    tokens = []
    for model in pair:
        torch.manual_seed(1)
        model.add_adapter("anti", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LEN))
        torch.nn.init.normal_(model.prompt_encoder["anti"].embedding.weight)

        def contrast(seen, scores, model=model):
            model.set_adapter("anti")
            other = model(input_ids=seen).logits[:, -1]
            model.set_adapter("default")
            return 2 * scores - other

        tokens.append(generated(model, logits_processor=[contrast], use_cache=True))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["forward", "generate", "disable_adapter"])
def test_methods_have_their_signatures(pair, name):
    rival, model = (getattr(model, name) for model in pair)
    assert inspect.signature(model) == inspect.signature(rival) and model.__name__ == rival.__name__


def test_an_error_underneath_leaves_the_prefix_in_place(pair):
    rival, model = pair
    with pytest.raises(Exception):  # noqa: B017 whatever torch says of a token that is not there
        model.base_model(input_ids=torch.tensor([[10**6]]))
    torch.testing.assert_close(model(input_ids=ids()).logits, rival(input_ids=ids()).logits, **TOLERANCE)
    with pytest.raises(Exception):  # noqa: B017
        model(input_ids=torch.tensor([[10**6]]))
    torch.testing.assert_close(model.base_model(input_ids=ids()).logits, rival.base_model(input_ids=ids()).logits, **TOLERANCE)


def test_an_adapter_for_inference(family, tmp_path):
    for kind, options in KINDS.items():
        rival = peft_model(tiny_model(family), PREFIX_LEN, **options)
        rival.save_pretrained(tmp_path / kind)
        model = accelerate_peft(peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / kind))
        torch.testing.assert_close(model(input_ids=ids()).logits, rival(input_ids=ids()).logits, **TOLERANCE)
        assert torch.equal(generated(model), generated(rival))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_peft_s_byte_for_byte(kind, tmp_path):
    rival, model = twins(tiny_model("llama"), PREFIX_LEN, **KINDS[kind])
    accelerate_peft(model)(input_ids=ids())
    generated(model)
    model.save_pretrained(tmp_path / "ours")
    rival.save_pretrained(tmp_path / "peft")
    names = {file.name for file in (tmp_path / "peft").iterdir()}
    assert {file.name for file in (tmp_path / "ours").iterdir()} == names and "adapter_model.safetensors" in names
    assert all((tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes() for name in names)
    for contents in ("state_dict", "named_parameters", "named_buffers"):
        expected, got = (dict(getattr(side, contents)()) for side in (rival, model))
        assert list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in got)


# Undoing it


@pytest.mark.parametrize("kind", KINDS)
def test_restored_it_is_bitwise_what_it_was(family, kind):
    model = peft_model(tiny_model(family), PREFIX_LEN, **KINDS[kind])
    with model.disable_adapter():  # leaves attributes on the object
        pass
    generated(model)

    def state():
        return {
            name: (set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
            for name, module in model.named_modules()
        }

    config, before, attributes = model.config, model(input_ids=ids(), labels=ids()), dict(vars(model))
    tokens, grads, contents = generated(model), gradients(model, before.loss), state()
    accelerate_peft(model)
    assert not torch.equal(generated(model), tokens * 0) and state() != contents
    assert restore_peft(model) is model
    after = model(input_ids=ids(), labels=ids())
    assert torch.equal(after.logits, before.logits) and torch.equal(generated(model), tokens)
    assert all(torch.equal(grad, grads[name]) for name, grad in gradients(model, after.loss).items())
    assert state() == contents and dict(vars(model)) == attributes
    assert model.config is config and all(getattr(m, "config", config) is config for m in model.base_model.modules())
    accelerate_peft(model)


def test_a_copy_is_accelerated_by_itself(pair):
    rival, model = pair
    model(input_ids=ids(), labels=ids()).loss.backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.zero_()
    expected, got = (side(input_ids=ids(), labels=ids()) for side in (rival, twin))
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    twin.zero_grad()
    assert_same_gradients(gradients(twin, got.loss), gradients(rival, expected.loss))
    assert (model(input_ids=ids()).logits - expected.logits).abs().max() > 1e-2


def test_a_model_that_is_saved_whole(family, tmp_path):
    model = accelerate_peft(peft.get_peft_model(tiny_model(family), peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3)))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(input_ids=ids()).logits, model(input_ids=ids()).logits)
    assert torch.equal(generated(loaded), generated(model))
    assert restore_peft(loaded) is loaded


def test_mixed_precision_of_trainer_and_back(tmp_path):
    import transformers

    rows = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids(6)]
    args = transformers.TrainingArguments(
        tmp_path, max_steps=2, bf16=True, use_cpu=True, learning_rate=0.1, report_to=[], save_strategy="no"
    )
    model = accelerate_peft(peft_model(tiny_model("llama"), PREFIX_LEN))
    before = model.prompt_encoder["default"].embedding.weight.detach().clone()
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    assert (model.prompt_encoder["default"].embedding.weight - before).abs().max() > 0.05
    with pytest.raises(ValueError, match="its forward has been replaced since accelerate_peft"):
        restore_peft(model)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    after = model(input_ids=ids()).logits
    torch.testing.assert_close(restore_peft(model)(input_ids=ids()).logits, after, **TOLERANCE)


def test_a_model_that_was_changed_again_is_not_restored():
    model = accelerate_peft(peft_model(tiny_model("llama"), PREFIX_LEN))
    with model.disable_adapter(), pytest.raises(ValueError, match="forward, .* replaced since accelerate_peft"):
        restore_peft(model)
    restore_peft(model)
    with pytest.raises(ValueError, match="expected one that accelerate_peft returned"):
        restore_peft(model)


# What is refused


def test_what_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="expected a PeftModel, got LlamaForCausalLM"):
        accelerate_peft(tiny_model("llama"))
    lora = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(NotImplementedError, match="PREFIX_TUNING or CARTRIDGE, got LORA"):
        accelerate_peft(lora)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(NotImplementedError, match="got PROMPT_TUNING"):
        accelerate_peft(peft.get_peft_model(tiny_model("llama"), prompt))
    without_task = peft.PeftModel(tiny_model("llama"), peft.PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(NotImplementedError, match="task_type: without one PEFT never uses the prefix"):
        accelerate_peft(without_task)
    other = peft_model(tiny_model("llama"), PREFIX_LEN, num_layers=2)
    with pytest.raises(ValueError, match="expected an adapter with 3 layers, .*, got 2 layers, 2 kv_heads, head_dim 16"):
        accelerate_peft(other)
    model = accelerate_peft(peft_model(tiny_model("llama"), PREFIX_LEN))
    with pytest.raises(ValueError, match="it is accelerated already"):
        accelerate_peft(model)
    other = peft_model(tiny_model("llama"), PREFIX_LEN)
    with other.disable_adapter(), pytest.raises(ValueError, match="its forward is not PEFT's own"):
        accelerate_peft(other)
    accelerate_peft(other)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(input_ids=ids(), output_attentions=True)
    with pytest.raises(ValueError, match="its PEFT adapter is a prefix or prompt already"):
        attach_prefix(model, random_prefix(tiny_model("llama")))
    attached = peft_model(tiny_model("llama"), PREFIX_LEN)
    with attach_prefix(attached.base_model, Prefix.from_peft(attached)), pytest.raises(ValueError, match="prefix attached"):
        accelerate_peft(attached)
    assert not attached.base_model.base_model._forward_hooks and "forward" not in vars(attached)


def test_prefix_tuning_needs_no_peft():
    code = "import sys; sys.modules['peft'] = None; import prefix_tuning; print(prefix_tuning.accelerate_peft.__name__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "accelerate_peft\n"


def test_the_examples_of_the_document_run(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "peft.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"model": tiny_model("llama"), "plain_model": tiny_model("llama"), "ids": ids()}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and {file.name for file in (tmp_path / "runs").iterdir()} == {"adapter", "back"}
    assert torch.equal(load_file("runs/adapter/adapter_model.safetensors")["prompt_embeddings"],
                       load_file("runs/back/adapter_model.safetensors")["prompt_embeddings"])  # fmt: skip
