"""Prefix-tuning (Li & Liang 2021) of frozen transformers models, with one prefix that the whole batch shares."""

from prefix_tuning.attach import Attachment, attach_prefix, detach_prefix
from prefix_tuning.bank import PrefixBank
from prefix_tuning.peft import accelerate_peft, restore_peft
from prefix_tuning.prefix import Prefix
from prefix_tuning.prefixed_model import PrefixedModel
from prefix_tuning.train import PrefixTrainer

__all__ = [
    "Attachment", "Prefix", "PrefixBank", "PrefixTrainer", "PrefixedModel", "accelerate_peft", "attach_prefix",
    "detach_prefix", "restore_peft",
]  # fmt: skip
