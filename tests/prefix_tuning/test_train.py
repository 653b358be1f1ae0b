"""PrefixTrainer trains the prefix alone, as a plain loop would; its model stays as it was, in one process and in two."""

import copy
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback

from prefix_tuning import Prefix, PrefixTrainer, attach_prefix
from support.models import FAMILIES, random_prefix, tiny_model
from support.prefixes import mlp_prefix
from support.processes import run_twice
from support.tokenizer import tiny_tokenizer
from support.training import (
    CHECKPOINTING,
    PREFIX_LEN,
    ROWS,
    TOLERANCE,
    arguments,
    assert_prefixes_close,
    assert_prefixes_equal,
    losses,
    make_trainer,
    row_loss,
    trained,
)


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
@pytest.mark.parametrize("family", (*FAMILIES, "bloom", "deepseek_v2", "qwen3_next"))
def test_the_prefix_alone_is_trained(family, reparametrization, tmp_path):
    model = tiny_model(family)
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, hidden_size=8, seed=0)
    before = copy.deepcopy(prefix)
    modes = []

    class Modes(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            modes.append(({m.training for m in model.modules()}, {m.training for m in prefix.modules()}))
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prefix.parameters())
            assert all(p.grad is None for p in model.parameters())

    trained(tmp_path, model, prefix, options={"callbacks": [Modes()]}, weight_decay=0.1)
    assert modes == [({False}, {True})] * 4
    for (name, parameter), untouched in zip(model.state_dict().items(), tiny_model(family).state_dict().values(), strict=True):
        assert torch.equal(parameter, untouched), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for (name, parameter), old in zip(prefix.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(parameter, old), name


def train_by_hand(model, prefix, rows, steps, rate, *, warmup, weight_decay, max_grad_norm):
    """The losses of full-batch steps of torch's AdamW on the prefix, with a linear schedule; biases never decay."""
    tokenizer, seen = tiny_tokenizer(), []
    biases = [parameter for name, parameter in prefix.named_parameters() if name.endswith("bias")]
    others = [parameter for name, parameter in prefix.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (step / warmup if step < warmup else (steps - step) / (steps - warmup))
        sums, counts = zip(*(row_loss(model, prefix, tokenizer, row) for row in rows), strict=True)
        loss = sum(sums) / sum(counts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prefix.parameters(), max_grad_norm)
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_equals_a_loop_by_hand(family, reparametrization, tmp_path):
    """Padding, the loss on targets alone, the optimiser, the schedule and clipping, over six steps."""
    model, steps = tiny_model(family, max_position_embeddings=256), 6
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    by_hand, start = copy.deepcopy(prefix), copy.deepcopy(prefix)
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    expected = train_by_hand(model, by_hand, ROWS[:4], steps, 1e-2, warmup=2, **settings)
    trainer = trained(tmp_path, model, prefix, ROWS[:4], max_steps=steps, warmup_steps=2, **settings)
    torch.testing.assert_close(torch.tensor(losses(trainer)), torch.tensor(expected), **TOLERANCE)
    assert_prefixes_close(prefix, by_hand, atol=2e-4, rtol=1e-3)
    moved = max((a - b).abs().max() for a, b in zip(prefix.parameters(), start.parameters(), strict=True))
    assert moved > 0.01, "too little to see a difference"


DROPOUT = {
    "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}, "llama": {"attention_dropout": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", (False, True), ids=("stored", "recomputed"))
@pytest.mark.parametrize("family", DROPOUT)
def test_no_dropout(family, checkpointing, tmp_path, recwarn):
    prefixes = []
    for dropout in ({name: 0.0 for name in DROPOUT[family]}, DROPOUT[family]):
        trainer = trained(tmp_path, tiny_model(family, **dropout), max_steps=2, **{CHECKPOINTING: checkpointing})
        prefixes.append(trainer.prefix)
    assert_prefixes_equal(*prefixes)
    assert not [warning for warning in recwarn if "dropout" in str(warning.message)]


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_accumulation_equals_a_bigger_batch(reparametrization, tmp_path):
    """Rows have 15 to 60 target tokens, so a mean of means would show."""
    model = tiny_model("llama")
    prefix = random_prefix(model, PREFIX_LEN) if reparametrization is None else mlp_prefix(model)
    whole, parts = copy.deepcopy(prefix), prefix
    expected = trained(tmp_path, model, whole, ROWS[:4])
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert losses(trained(tmp_path, model, parts, ROWS[:4], **split)) == pytest.approx(losses(expected), rel=1e-5)
    assert_prefixes_close(parts, whole, atol=2e-4, rtol=1e-3)


def test_bfloat16_autocast_leaves_the_prefix_in_float32(tmp_path):
    model = tiny_model("llama")
    dtypes = set()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    trainer = trained(tmp_path, model, bf16=True)
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.prefix.parameters()} == {torch.float32}
    exact = trained(tmp_path)
    assert losses(trainer) == pytest.approx(losses(exact), rel=0.05)
    assert losses(trainer) != losses(exact)


@pytest.mark.parametrize("reparametrization", (None, "mlp"))
def test_a_model_in_bfloat16(reparametrization, tmp_path):
    model = tiny_model("llama").bfloat16()
    prefix = Prefix.for_model(model, PREFIX_LEN, reparametrization=reparametrization, hidden_size=8, seed=0)
    trainer = trained(tmp_path, model, prefix, ROWS[:4])
    assert {parameter.dtype for parameter in prefix.parameters()} == {torch.float32}
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_backend_and_window_reach_the_attention(tmp_path, monkeypatch):
    import prefix_tuning.attention

    called, original = [], prefix_tuning.attention.prefix_attention

    def spy(*args, **kwargs):
        called.append((kwargs["backend"], kwargs["first_key_position"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(prefix_tuning.attention, "prefix_attention", spy)
    trained(tmp_path, tiny_model("mistral"), max_steps=1, options={"padding_free": False})
    assert set(called) == {(None, None)}
    called.clear()
    trained(tmp_path, tiny_model("mistral"), max_steps=1, options={"backend": "reference", "prefix_window": "peft"})
    assert set(called) == {("reference", 0)}


def test_a_compiled_model(tmp_path):
    expected = trained(tmp_path / "plain", max_steps=2)
    model = tiny_model("llama")
    got = trained(tmp_path / "compiled", torch.compile(model, backend="eager"), random_prefix(model, PREFIX_LEN), max_steps=2)
    assert losses(got) == pytest.approx(losses(expected), rel=1e-5)


def test_a_loss_function_of_the_callers(tmp_path):
    def double(outputs, labels, num_items_in_batch):
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return 2 * cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    expected = losses(trained(tmp_path, max_steps=1))
    assert losses(trained(tmp_path, max_steps=1, options={"compute_loss_func": double})) == pytest.approx([2 * expected[0]])


@pytest.mark.parametrize("filters", (True, False))
def test_losses_that_are_not_finite(filters, tmp_path):
    """In their place the mean of those since the last log, as Trainer does it; who reads args meanwhile sees what was given."""
    values, seen = iter((3.0, math.nan, math.inf, 5.0, math.nan)), []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            seen.append(args.logging_nan_inf_filter)

    def loss_of(outputs, labels, num_items_in_batch):
        return outputs["logits"].sum() * 0 + next(values)

    changes = {"max_steps": 5, "logging_steps": 4, "logging_nan_inf_filter": filters}
    trainer = trained(tmp_path, options={"compute_loss_func": loss_of, "callbacks": [Watch()]}, **changes)
    first, *_, last = trainer.state.log_history
    expected = [(3 + 3 / 2 + 4.5 / 3 + 5) / 4, (11 + 0) / 5] if filters else [math.nan] * 2
    assert [first["loss"], last["train_loss"]] == pytest.approx(expected, nan_ok=True)
    assert set(seen) == {filters} and trainer.args.logging_nan_inf_filter == filters


def test_losses_that_are_not_finite_in_a_subclass(tmp_path):
    """Trainer leaves them out, as only it sees what a step of one's own gives."""

    class Mine(PrefixTrainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 1 else loss

    model = tiny_model("llama")
    trainer = Mine(model, random_prefix(model), arguments(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer())
    trainer.train()
    trainer.detach()
    assert all(map(math.isfinite, losses(trainer)))


def test_parameters_that_require_gradients_again_are_frozen_again(tmp_path):
    """As PEFT leaves those of an adapter that was switched off for an evaluation."""
    trainer = make_trainer(tmp_path)
    weight = trainer.attachment.model.lm_head.weight.requires_grad_(True)
    before = weight.detach().clone()
    trainer.train()
    trainer.detach()
    assert torch.equal(weight, before) and weight.grad is None


def test_tokens_that_see_later_ones_keep_their_mask(tmp_path):
    batches = []
    for options in ({}, {"use_bidirectional_attention": True}):
        trainer = make_trainer(tmp_path, tiny_model("gemma3", **options), options={"padding_free": False})
        batches.append(next(iter(trainer.get_train_dataloader())))
        trainer.detach()
    assert ["attention_mask" in batch for batch in batches] == [False, True]


def test_detach_gives_back_the_plain_model(tmp_path):
    model = tiny_model("llama")
    config, ids = model.config, torch.randint(3, 100, (2, 7))
    plain = model(input_ids=ids).logits
    trainer = make_trainer(tmp_path, model)
    trainer.train()
    assert not torch.equal(model(input_ids=ids).logits, plain)
    trainer.detach()
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert model.config is config and not any(hasattr(module, "layer_prefix") for module in model.modules())


def test_what_is_trained_must_be_attached(tmp_path):
    """Else evaluation would be of the plain model, or of another prefix."""
    model = tiny_model("llama")
    trainer = make_trainer(tmp_path, model, options={"eval_dataset": ROWS[:4]})
    loss = trainer.evaluate()["eval_loss"]
    trainer.attachment.enable(False)
    assert trainer.evaluate()["eval_loss"] != loss
    with pytest.raises(ValueError, match=r"attachment: the prefix is switched off; enable\(True\) comes before training"):
        trainer.train()
    trainer.attachment.enable(True)
    trainer.detach()
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(
            ValueError,
            match=r"model: expected the prefix to be attached, got no prefix; attach_prefix\(model, prefix\) comes first",
        ):
            call()
    with (
        attach_prefix(model, random_prefix(model)),
        pytest.raises(ValueError, match="model: expected the prefix to be attached, got another prefix"),
    ):
        trainer.evaluate()
    with attach_prefix(model, trainer.prefix):
        assert trainer.evaluate()["eval_loss"] == loss


DDP = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainingArguments
from prefix_tuning import Prefix, PrefixTrainer

folder, checkpointing = sys.argv[1:]
rows = json.load(open(f"{folder}/rows.json"))
args = TrainingArguments(
    f"{folder}/run", max_steps=3, per_device_train_batch_size=1, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
    learning_rate=1e-2, logging_steps=1, save_strategy="steps", save_steps=3, report_to="none", use_cpu=True,
    ddp_backend="gloo", disable_tqdm=True, dataloader_pin_memory=False, **{checkpointing: True},
)
trainer = PrefixTrainer(
    AutoModelForCausalLM.from_pretrained(f"{folder}/model"), Prefix.load(f"{folder}/prefix"), args, train_dataset=rows,
    eval_dataset=json.load(open(f"{folder}/evaluated.json")), processing_class=AutoTokenizer.from_pretrained(f"{folder}/model"),
)
trainer.remove_callback(PrinterCallback)
before = trainer.evaluate()["eval_loss"]
trainer.train()
loss = trainer.evaluate()["eval_loss"]
trainer.prefix.save(f"{folder}/trained{trainer.args.process_index}", keep_reparametrization=True)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
wrapped = trainer.model_wrapped
result = {
    "processes": trainer.args.world_size, "wrapped": type(wrapped).__name__, "losses": losses, "before": before,
    "eval_loss": loss, "extra work": [wrapped.find_unused_parameters, wrapped.broadcast_buffers],
}
json.dump(result, open(f"{folder}/result{trainer.args.process_index}.json", "w"))
"""


def test_two_processes_equal_one_with_their_batches_together(tmp_path):
    """Two gloo processes with two accumulated batches of one row each, with gradient checkpointing and an MLP.

    An evaluation comes first, after which accelerate would wrap no model in DDP. The six rows that are evaluated are three
    batches: one process fills up with a batch that does not count.
    """
    model = tiny_model("llama")
    prefix = mlp_prefix(model)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prefix.save(tmp_path / "prefix", keep_reparametrization=True)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS[:4]))
    (tmp_path / "evaluated.json").write_text(json.dumps(ROWS[:6]))
    (tmp_path / "script.py").write_text(DDP)
    run_twice(tmp_path / "script.py", tmp_path, CHECKPOINTING)

    evaluated = {"options": {"eval_dataset": ROWS[:6]}, "per_device_eval_batch_size": 2}
    one = make_trainer(tmp_path / "one", model, prefix, ROWS[:4], max_steps=3, **evaluated)
    before = one.evaluate()["eval_loss"]
    one.train()
    one.detach()
    with attach_prefix(model, prefix):
        eval_loss = one.evaluate()["eval_loss"]
    for rank in range(2):
        result = json.loads((tmp_path / f"result{rank}.json").read_text())
        assert result["processes"] == 2 and result["wrapped"] == "DistributedDataParallel"
        assert result["extra work"] == [False, False], "of searching for unused parameters, of sending the frozen buffers"
        assert result["losses"] == pytest.approx(losses(one), rel=1e-5)
        assert result["before"] == pytest.approx(before, rel=1e-5)
        assert result["eval_loss"] == pytest.approx(eval_loss, rel=1e-5)
        assert_prefixes_close(Prefix.load(tmp_path / f"trained{rank}"), prefix, atol=2e-4, rtol=1e-3)
    assert_prefixes_equal(Prefix.load(tmp_path / "run" / "checkpoint-3"), Prefix.load(tmp_path / "trained0"))
