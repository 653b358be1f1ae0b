"""Whole models: one training step and greedy generation with a prefix, ours against PEFT's, timed in turn in one process.

    python benchmarks/bench_whole.py          SmolLM2-135M-Instruct on the CPU, to benchmarks/results/cpu/whole.json
        train       as `make demo`: rows of E2E, 4 and 16 a step, a prefix of 16 positions; forward, loss, backward, AdamW
        generate    prompts from E2E of one length, 32 new tokens each: 1, 8, 32 and 64 rows, prefixes of 16 to 2048 positions
                    (the largest of both: 8 new tokens)

`selected` is what attach_prefix and PrefixTrainer do by themselves, `sdpa` the same with torch's stock kernels alone, `peft`
the package peft with the same weights in its prefix. By itself PrefixTrainer reads rows behind one another, where there are
several; `padded` is the other way. On a GPU training steps and generation's are replayed as CUDA graphs. `without graphs` they
are not, nor over a `growing cache`, and `kept graphs` are those of one cache for all calls.
`accelerated` is PEFT's model after accelerate_peft. All share the frozen model's weights. Before anything is timed, two
training steps must give the losses of the reference backend; logits after the prompt must be the reference's, and in float32
all tokens agree. On a GPU a step is also timed as Trainer takes it (trainer_steps.py).
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import measure
import prefix_kernels
from attention_row import finish
from cases import E2E_LENGTHS, SMOLLM2_MODEL, Case, Model, Run
from demo import DATA, INIT_TEXT
from device_profile import device_profile
from prefix_kernels.select import choose_backend
from prefix_tuning import Prefix, accelerate_peft, attach_prefix
from prefix_tuning.data import IGNORED, PromptCompletionCollator, tokenize_rows, without_idle_mask
from prefix_tuning.e2e import load_e2e, to_examples
from prefix_tuning.offline_model import OFFLINE_MODEL, load_model_and_tokenizer
from prefix_tuning.own_cache import CACHE
from prefix_tuning.padding_free import padding_free_collator
from prefix_tuning.prefixed_model import PrefixedModel
from trainer_steps import examples_of, trainer_seconds

OUTPUT = Path(__file__).parent / "results" / "cpu" / "whole.json"
SMOLLM2 = replace(SMOLLM2_MODEL, name=OFFLINE_MODEL)
GENERATED = ((8, 128), (8, 512), (32, 512), *((b, p) for p in (16, 512, 2048) for b in (1, 8, 64) if (b, p) != (8, 512)))
FEWER_TOKENS = {(64, 2048): 8}  # PEFT copies 6 GB for each
RUNS = (
    Run(SMOLLM2, "train", 4, 16),
    Run(SMOLLM2, "train", 16, 16),
    *(Run(SMOLLM2, "generate", *size, prompt_len=24, new_tokens=FEWER_TOKENS.get(size, 32)) for size in GENERATED),
)
BATCHES = 4  # of a training run, in turn
LEARNING_RATE = 1e-3
GROWING_ROWS = 64  # least for that way: with fewer it waits for the host alone, for seconds a call
LOSS_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of each of two steps
# ‖actual − expected‖ / ‖expected‖; in bfloat16 one row's logits are up to 0.08 from float32's, whatever computes attention
LOGIT_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
TARGET_SHARE = 0.47  # of E2E's tokens

Batch = Mapping[str, Tensor]


class Ours:
    """The model with the prefix attached, as PrefixTrainer trains it on padded rows (padding_free=False)."""

    generation: Mapping[str, Any] = {}  # further arguments of generate
    collate = staticmethod(without_idle_mask)  # as PrefixTrainer does before a batch goes to the device

    def __init__(self, model: nn.Module, prefix: Prefix, backend: str | None = None, cuda_graphs: bool = True):
        self.model, self.prefix = share_weights(model), copy.deepcopy(prefix)
        self.attachment = attach_prefix(self.model, self.prefix, backend=backend)
        self.trained = PrefixedModel(self.model, self.prefix, cuda_graphs)
        self.optimizer = optimizer_of(self.prefix.parameters())

    def loss(self, batch: Batch) -> Tensor:
        return self.trained(**batch)["loss"]


class OursPaddingFree(Ours):
    """Rows behind one another, and what several begin with once."""

    def collate(self, batch: Batch) -> dict[str, Any]:
        return padding_free_collator(self.model, True)(examples_of([batch]))


class OursGrowing(Ours):
    """Over a cache that grows, as PEFT's does: steps run as they are."""

    generation = {"cache_implementation": "dynamic"}


class OursKept(Ours):
    """Over one static cache for all calls, whose graphs are kept from call to call, for prompts and answers of that length."""

    def __init__(self, model: nn.Module, prefix: Prefix, length: int):
        super().__init__(model, prefix)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        self.keeping = self.attachment.keep_graphs()
        self.keeping.__enter__()

    @property
    def generation(self) -> Mapping[str, Any]:
        self.cache.reset()
        return {CACHE: self.cache}


class Peft:
    """The same through the package peft, with the same keys and values in its adapter."""

    generation: Mapping[str, Any] = {}
    collate = staticmethod(lambda batch: batch)

    def __init__(self, model: nn.Module, prefix: Prefix):
        import peft

        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.prefix_len)
        self.model = peft.get_peft_model(share_weights(model), config).eval()  # eval: no dropout, as ours
        weight = self.model.prompt_encoder["default"].embedding.weight  # [prefix_len, layers · 2 · kv_heads · head_dim]
        with torch.no_grad():
            stacked = torch.stack([tensor for pair in prefix.layers() for tensor in pair])
            weight.copy_(stacked.permute(2, 0, 1, 3).reshape(weight.shape))
        self.optimizer = optimizer_of([weight])
        self._name_the_cache()

    def loss(self, batch: Batch) -> Tensor:
        return self.model(**batch).loss

    def _name_the_cache(self) -> None:
        """peft 0.21 looks for the cache under its old name, and under transformers 5.24 generates without the prefix."""
        prepare = self.model.base_model_prepare_inputs_for_generation

        def prepare_inputs(*args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = prepare(*args, **kwargs)
            if "cache" in inputs:
                inputs["past_key_values"] = inputs.pop("cache")
            return inputs

        self.model.base_model_prepare_inputs_for_generation = prepare_inputs


class Accelerated(Peft):
    """PEFT's own object, its calls computed by ours."""

    def __init__(self, model: nn.Module, prefix: Prefix):
        super().__init__(model, prefix)
        accelerate_peft(self.model)


def optimizer_of(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The one that transformers.Trainer makes by default."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def train_step(way: Ours | Peft, batch: Batch) -> float:
    way.optimizer.zero_grad(set_to_none=True)
    loss = way.loss(batch)
    loss.backward()
    way.optimizer.step()
    return loss.item()  # waits for the device


def generate(way: Ours | Peft, prompts: Tensor, new_tokens: int) -> Tensor:
    """int [rows, new_tokens]; no row ends early."""
    with torch.no_grad():
        tokens = way.model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0, **way.generation,
        )  # fmt: skip
    return tokens[:, prompts.shape[1] :].cpu()


def last_logits(way: Ours | Peft, prompts: Tensor) -> Tensor:
    with torch.no_grad():
        return way.model(input_ids=prompts, attention_mask=torch.ones_like(prompts)).logits[:, -1].float()


def makers(run: Run, model: nn.Module, prefix: Prefix) -> dict[str, Callable[[], Ours | Peft]]:
    """What is compared, ours first."""
    found: dict[str, Callable[[], Ours | Peft]] = {"selected": lambda: Ours(model, prefix)}
    if run.what == "train" and padding_free_collator(model, None, rows=run.batch) is not None:
        found = {"selected": lambda: OursPaddingFree(model, prefix), "padded": found["selected"]}
    if model.device.type == "cuda" and run.what == "train":
        found["without graphs"] = lambda: Ours(model, prefix, cuda_graphs=False)
    elif model.device.type == "cuda":
        if run.batch >= GROWING_ROWS:
            found["growing cache"] = lambda: OursGrowing(model, prefix)
        found["kept graphs"] = lambda: OursKept(model, prefix, run.prompt_len + run.new_tokens)
    elif prefix_kernels.available_backends()[0] != "sdpa":
        found["sdpa"] = lambda: Ours(model, prefix, "sdpa")
    if run.what == "train":
        found["accelerated"] = lambda: Accelerated(model, prefix)
    return found | {"peft": lambda: Peft(model, prefix)}


def measure_run(
    run: Run, model: nn.Module, prefix: Prefix, inputs: Sequence[Batch] | Tensor, seconds: float, rounds: int,
    trainer: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One row.

    Args:
        inputs: the batches of a training run, or the prompts, int [rows, prompt_len].
        trainer: whether a training step is also timed as Trainer takes it.
    """
    tokens = run.batch * run.new_tokens if run.what == "generate" else sum(int(b["attention_mask"].sum()) for b in inputs)
    row = {
        "key": run.key, "run": asdict(run), "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type, "chosen": "selected", "backend": backend_of(run, model), "ways": {},
        "tokens": tokens if run.what == "generate" else tokens / len(inputs),
    }  # fmt: skip
    calls: dict[str, Callable[[int], Any]] = {}
    reference = Ours(model, prefix, "reference")
    expected = Checked(run, reference, on_device(reference, inputs, model.device), tokens=False)
    first: Checked | None = None
    for name, make in makers(run, model, prefix).items():
        row["ways"][name] = found = {"ours": name != "peft"}
        if name in ("accelerated", "peft") and importlib.util.find_spec("peft") is None:
            found["not_available"] = "peft is not installed"
            continue
        try:
            way = make()
            given = on_device(way, inputs, model.device)
            checked, found["peak_bytes"] = measure.with_peak(lambda way=way, given=given: Checked(run, way, given))
            first = first or checked
            wrong = checked.differs(expected, first, model.dtype, found)
            call = _call(run, way, given)
        except Exception as error:
            wrong = measure.first_line(error)
        if wrong is None:
            calls[name] = call
        else:
            found["failed"] = wrong
    training = run.what == "train"  # generation was warmed up by its check
    # A step of a shape is recorded when it comes for the second time: all are, before any is timed.
    comparison = measure.Comparison(calls, len(inputs) if training else 1, warm_up=2 * training, settles=False)
    comparison.run(seconds, rounds)
    if training and model.device.type == "cuda":
        for name, call in calls.items():
            row["ways"][name]["profile"] = device_profile(lambda call=call: call(0))
    if training and trainer:
        row["in_trainer"] = _in_trainer(run, model, prefix, inputs)
    return finish(row, comparison.timings())


def _in_trainer(run: Run, model: nn.Module, prefix: Prefix, batches: Sequence[Batch]) -> dict[str, Any]:
    """A step of PrefixTrainer ("selected") and of Trainer around PEFT's model, or why there is none."""
    makers = {
        "selected": lambda: (share_weights(model), copy.deepcopy(prefix)),
        "peft": lambda: (Peft(model, prefix).model, None),
    }
    found = {}
    for name, make in makers.items():
        try:
            found[name] = trainer_seconds(*make(), examples_of(batches), run.batch, LEARNING_RATE)
        except Exception as error:  # ImportError without the package peft
            found[name] = {"failed": measure.first_line(error)}
    return found


def backend_of(run: Run, model: nn.Module) -> str:
    """The backend of the layers, in generation that of a decoding step."""
    shape, training = run.model, run.what == "train"
    length = max(E2E_LENGTHS) if training else run.prompt_len + run.new_tokens
    case = Case(shape.name, run.batch, shape.heads, shape.kv_heads, shape.head_dim, length if training else 1, length,
                run.prefix_len, str(model.dtype).removeprefix("torch."))  # fmt: skip
    return choose_backend(case.problem()._replace(device=model.device.type, gradients=training), None)


def on_device(way: Ours | Peft, inputs: Sequence[Batch] | Tensor, device: torch.device) -> list[Batch] | Tensor:
    """The inputs as a way is given them."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return [
        {name: value.to(device) if isinstance(value, Tensor) else value for name, value in way.collate(batch).items()}
        for batch in inputs
    ]


class Checked:
    """What a way gives before it is timed: the losses of two training steps, or logits and tokens."""

    def __init__(self, run: Run, way: Ours | Peft, inputs: Sequence[Batch] | Tensor, tokens: bool = True):
        self.losses = [train_step(way, inputs[i]) for i in range(2)] if run.what == "train" else None
        self.logits = last_logits(way, inputs) if run.what == "generate" else None
        self.tokens = generate(way, inputs, run.new_tokens) if run.what == "generate" and tokens else None

    def differs(self, expected: Checked, first: Checked, dtype: torch.dtype, found: dict[str, Any]) -> str | None:
        """Writes losses, errors and the share of equal tokens to `found`; says what is wrong, or None."""
        if self.losses is not None:
            found["losses"] = self.losses
            pairs = zip(self.losses, expected.losses, strict=True)
            close = all(abs(loss - right) <= LOSS_LIMITS[dtype] * abs(right) for loss, right in pairs)
            return None if close else f"wrong: losses {self.losses}, the reference has {expected.losses}"
        found["errors"] = {"logits": measure.errors(self.logits, expected.logits)}
        found["equal_tokens"] = (self.tokens == first.tokens).double().mean().item()
        if not found["errors"]["logits"][2] <= LOGIT_LIMITS[dtype]:
            return f"wrong: relative error {found['errors']['logits'][2]} of the logits"
        if dtype == torch.float32 and found["equal_tokens"] < 1:
            return f"wrong: {found['equal_tokens']:.1%} of the tokens are equal"
        return None


def _call(run: Run, way: Ours | Peft, inputs: Sequence[Batch] | Tensor) -> Callable[[int], Any]:
    if run.what == "train":
        return lambda index: train_step(way, inputs[index])
    return lambda index: generate(way, inputs, run.new_tokens)


def random_model(shape: Model, device: str, dtype: torch.dtype) -> nn.Module:
    """A model of that shape with random weights, made in place; no file is read."""
    if shape.family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocabulary, n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads,
            n_positions=4096,  # the published table of 1024 would not hold the longest prefix
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            intermediate_size=shape.intermediate, max_position_embeddings=8192,
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def random_inputs(run: Run) -> list[Batch] | Tensor:
    """Random tokens: batches with the lengths of E2E's rows, padded on the right, or prompts of one length."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = run.model.vocabulary
    if run.what == "generate":
        return torch.randint(vocabulary, (run.batch, run.prompt_len), generator=generator)
    batches = []
    for index in range(BATCHES):
        lengths = torch.tensor([E2E_LENGTHS[(index * run.batch + i) % len(E2E_LENGTHS)] for i in range(run.batch)])[:, None]
        column = torch.arange(int(lengths.max()))
        ids = torch.randint(vocabulary, (run.batch, int(lengths.max())), generator=generator)
        target = (column < lengths) & (column >= lengths * (1 - TARGET_SHARE))
        batch = {"input_ids": ids, "attention_mask": (column < lengths).long(), "labels": ids.where(target, IGNORED)}
        batches.append(batch)
    return batches


def e2e_inputs(run: Run, tokenizer) -> list[Batch] | Tensor:
    """Rows of E2E's training set: batches as the demo's, or the beginnings of prompts that are long enough."""
    rows = random.Random(0).sample(to_examples(load_e2e(DATA / "train.jsonl.gz")), 400)
    if run.what == "generate":
        prompts = [ids for row in rows if len(ids := tokenizer(row["prompt"])["input_ids"]) >= run.prompt_len]
        return torch.tensor([ids[: run.prompt_len] for ids in prompts[: run.batch]])
    examples, collate = tokenize_rows(rows[: BATCHES * run.batch], tokenizer), PromptCompletionCollator(tokenizer)
    return [collate(examples[i * run.batch : (i + 1) * run.batch]) for i in range(BATCHES)]


def line(row: dict[str, Any]) -> str:
    """A row in one line."""
    shown = {name: f"{way['median']:.3f} s" if "median" in way else list(way.values())[-1] for name, way in row["ways"].items()}
    against = {name: way["median"] for name, way in row["ways"].items() if "median" in way and name != "selected"}
    ours = row["ways"]["selected"].get("median")
    ratios = [f"{seconds / ours:.2f}x over {name}" for name, seconds in against.items()] if ours else ["LOSS: it failed"]
    loss = " LOSS" if ours and any(seconds < ours for seconds in against.values()) else ""
    return f"{row['key']}: {', '.join(f'{name} {text}' for name, text in shown.items())}: {', '.join(ratios)}{loss}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="results file; its rows of this very code are kept")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="rows whose key has one of these in it")
    parser.add_argument("--seconds-per-row", type=float, default=30.0, help="of timing")
    parser.add_argument("--rounds", type=int, default=5, help="of every way at least, however long they take")
    parser.add_argument("--threads", type=int, help="of torch; default: torch's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model and its prefix")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    results = measure.Results(args.output, measure.environment("cpu"))
    model, tokenizer = load_model_and_tokenizer(device="cpu", dtype=getattr(torch, args.dtype))
    runs = [run for run in RUNS if any(text in run.key for text in args.only)]
    for run in runs:
        if not results.done(run.key):
            prefix = Prefix.for_model(model, run.prefix_len, init="text", text=INIT_TEXT, tokenizer=tokenizer)
            inputs = e2e_inputs(run, tokenizer)
            results.put(measure_run(run, model, prefix, inputs, args.seconds_per_row, args.rounds))
        print(line(results.rows[run.key]), flush=True)
    print(f"written to {args.output}")
    return int(any("median" not in results.rows[run.key]["ways"]["selected"] for run in runs))


if __name__ == "__main__":
    sys.exit(main())
