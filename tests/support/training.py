"""What tests of training share: rows, arguments of a short run, silent trainers, the loss of a row, prefixes compared."""

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PrinterCallback, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_tuning import PrefixTrainer
from prefix_tuning.data import IGNORED
from support.generation import CACHE
from support.models import VOCABULARY, random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PREFIX_LEN = 5
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}

NAMES = ("Aromi", "Browns Cambridge", "Cotto", "Fitzbillies", "Green Man", "Loch Fyne", "Strada", "Wildwood")
ROWS = [{"prompt": f"name : {name}\n", "completion": f"{name} is a pub." * (1 + i % 3)} for i, name in enumerate(NAMES)]
# Newer versions of transformers call it activation checkpointing, and warn of the old name.
CHECKPOINTING = next(
    field.name for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)  # fmt: skip
# Rows of which some begin alike.
SYSTEM = "in one line\n"
ALIKE = [{**row, "prompt": SYSTEM + row["prompt"]} for row in ROWS[::3]] + [
    {"prompt": SYSTEM + ROWS[0]["prompt"], "completion": "A pub, Aromi."}, {"prompt": "name : x\n", "completion": "x"},
]  # fmt: skip


def batch_of(rows, length, seed=0, device="cpu"):
    """The first row is full, the others end earlier and earlier; labels are each row's last tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    column, lengths = torch.arange(length), length - torch.arange(rows)[:, None]
    labels = input_ids.where((column < lengths) & (column >= lengths - 4 - seed % 3), IGNORED)
    return {"input_ids": input_ids.to(device), "labels": labels.to(device)}


def arguments(folder, **changes):
    defaults = {
        "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(str(folder), **defaults | changes)


def silent_trainer(folder, model, prefix, rows, options=None, **changes):
    """`changes` go to TrainingArguments, `options` to PrefixTrainer."""
    options = {"processing_class": tiny_tokenizer()} | (options or {})
    trainer = PrefixTrainer(model, prefix, arguments(folder, **changes), train_dataset=rows, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_trainer(folder, model=None, prefix=None, rows=ROWS, options=None, **changes):
    """A silent trainer on the rows, of a tiny Llama and a random prefix if none are given."""
    model = tiny_model("llama") if model is None else model
    prefix = random_prefix(model, PREFIX_LEN) if prefix is None else prefix
    return silent_trainer(folder, model, prefix, rows, options, **changes)


def trained(folder, *args, **kwargs):
    """A trainer as of make_trainer, after training and detached."""
    trainer = make_trainer(folder, *args, **kwargs)
    trainer.train()
    trainer.detach()
    return trainer


def row_loss(model, prefix, tokenizer, row):
    """Summed loss of the completion and the number of its tokens, by the plain model with the prefix as its cache."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    target = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([prompt + target])
    cache = DynamicCache(config=model.config)
    for index, (key, value) in enumerate(prefix.layers()):
        cache.update(key[None], value[None], index)
    logits = model(
        input_ids=ids, attention_mask=torch.ones(1, PREFIX_LEN + ids.shape[1], dtype=torch.long), **{CACHE: cache},
        position_ids=torch.arange(ids.shape[1])[None] + PREFIX_LEN,
    ).logits  # fmt: skip
    return cross_entropy(logits[0, len(prompt) - 1 : -1], torch.tensor(target), reduction="sum"), len(target)


def count_forwards(model):
    """How often each layer has begun to run, updated as it does; recomputation ends as early as it can."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    counts = [0] * len(layers)

    def count(index):
        def hook(module, args):
            counts[index] += 1

        return hook

    for index, layer in enumerate(layers):
        next(layer.children()).register_forward_pre_hook(count(index))
    return counts


def assert_prefixes_close(actual, expected, **tolerance):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in actual.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], **tolerance or TOLERANCE)


def assert_prefixes_equal(actual, expected):
    assert_prefixes_close(actual, expected, atol=0, rtol=0)
