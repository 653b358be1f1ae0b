"""What the tests of the command prefix-tuning begin with: a folder of models and files, and a short run of `train` there."""

import json

import transformers

from support.encoders import tiny_encoder
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

ROWS = [{"prompt": f"name : {name}\n", "completion": f"{name} is a pub."} for name in ("Aromi", "Browns", "Cotto", "Strada")]
TALKS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in ROWS
]
E2E = [
    {"mr": "name[Aromi], eatType[pub]", "refs": ["Aromi is a pub.", "There is a pub, Aromi."]},
    {"mr": "name[Cotto], food[Thai]", "refs": ["Cotto serves Thai food."]},
]
FILES = {"rows": ROWS, "talks": TALKS, "e2e": E2E}
CTRL = transformers.CTRLConfig(vocab_size=128, n_positions=64, n_embd=16, dff=16, n_layer=1, n_head=4)


def fill(folder):
    """Models, their tokenizers, prefixes, and one data file of each form."""
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    random_prefix(model).save(folder / "prefix")
    random_prefix(model, 3).save(folder / "short")
    random_prefix(tiny_model("llama", num_hidden_layers=2)).save(folder / "other")
    random_prefix(model, 3).save(folder / "run" / "prefix")
    random_prefix(model, 3).to_peft(folder / "adapter")
    for name, other in (("bert", tiny_encoder("bert", vocab_size=128)), ("gpt2", tiny_model("gpt2", pad_token_id=2))):
        other.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    transformers.CTRLLMHeadModel(CTRL).save_pretrained(folder / "ctrl")
    tiny_tokenizer().save_pretrained(folder / "ctrl")
    model.save_pretrained(folder / "strict")
    tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}").save_pretrained(folder / "strict")
    for name, rows in FILES.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(run, output, *more, file="rows.jsonl"):
    return run(
        "train", "--model", "model", "--train-file", file, "--output", output, "--prefix-len", 4, "--hidden-size", 8,
        "--batch-size", 2, *more,
    )  # fmt: skip
