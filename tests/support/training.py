"""What tests of training share: rows, arguments of a short run, a silent trainer."""

import dataclasses

from transformers import PrinterCallback, TrainingArguments

from prefix_tuning import PrefixTrainer
from support.tokenizer import tiny_tokenizer

NAMES = ("Aromi", "Browns Cambridge", "Cotto", "Fitzbillies", "Green Man", "Loch Fyne", "Strada", "Wildwood")
ROWS = [{"prompt": f"name : {name}\n", "completion": f"{name} is a pub." * (1 + i % 3)} for i, name in enumerate(NAMES)]
# Newer versions of transformers call it activation checkpointing, and warn of the old name.
CHECKPOINTING = next(
    field.name for field in dataclasses.fields(TrainingArguments)
    if field.name in ("activation_checkpointing", "gradient_checkpointing")
)  # fmt: skip


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
