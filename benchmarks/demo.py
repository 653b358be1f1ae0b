"""The main job on real input: SmolLM2-135M-Instruct learns to describe restaurants (E2E) through a prefix of 16 positions.

`make demo` runs this. It scores greedy texts for meaning representations of the dev set without the prefix, trains the
prefix, scores again, and writes to --output:

    prefix/             the trained prefix, for Prefix.load
    metrics.json        the numbers, among them the loss of every step
    generations.jsonl   every scored meaning representation with its references and both texts
    loss.png            the loss curve

Before and after, the model gets the same prompts, stops at its end-of-text token or after --max-new-tokens, and the first
line of what it wrote that is not blank counts.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import logging

from prefix_tuning.attach import attach_prefix
from prefix_tuning.e2e import linearize, load_e2e, to_examples
from prefix_tuning.evaluate import e2e_reference_scores, evaluate_e2e
from prefix_tuning.files import write_json_lines
from prefix_tuning.offline_model import OFFLINE_MODEL, load_model_and_tokenizer
from prefix_tuning.plot import save_loss_curve
from prefix_tuning.recipe import TrainSettings, train_prefix, write_metrics

DATA = Path(__file__).parent / "data" / "e2e"
# The prefix starts from the keys and values that the model gives to these words, repeated or cut to its length.
INIT_TEXT = "Describe the restaurant in one or two sentences, using every fact of the table:\n"
SHOWN = 3


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    settings = TrainSettings(
        prefix_len=args.prefix_len, init_text=INIT_TEXT, learning_rate=args.learning_rate, steps=args.steps,
        batch_size=args.batch_size, warmup=args.warmup, seed=args.seed,
    ).resolved()  # fmt: skip
    started = time.perf_counter()
    logging.disable_progress_bar()
    say(f"model {OFFLINE_MODEL}, data E2E (Novikova et al. 2017)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_model_and_tokenizer(device=device)
    dev = load_e2e(DATA / "dev.jsonl.gz")
    dev = random.Random(0).sample(dev, min(args.evaluate, len(dev)))
    generation = {"batch_size": 20, "max_new_tokens": args.max_new_tokens}

    say(f"before training: {len(dev)} meaning representations of the dev set, no prefix")
    before, texts_before = evaluate_e2e(model, tokenizer, dev, progress="generating", **generation)

    # As many rows as the steps take, drawn here, so that no others need to be tokenised.
    rows = to_examples(load_e2e(DATA / "train.jsonl.gz"))
    rows = random.Random(args.seed).sample(rows, min(args.steps * args.batch_size, len(rows)))
    say(f"training a prefix of {args.prefix_len} positions: {args.steps} steps of {args.batch_size} references")
    prefix, metrics = train_prefix(model, tokenizer, rows, args.output, settings, overwrite=True)

    say("after training: the same meaning representations, the prefix attached")
    with attach_prefix(model, prefix):
        after, texts_after = evaluate_e2e(model, tokenizer, dev, progress="generating", **generation)

    metrics |= {f"{name}_before": value for name, value in before.items()}
    metrics |= {f"{name}_after": value for name, value in after.items()}
    metrics |= e2e_reference_scores(dev)
    metrics |= {"model": OFFLINE_MODEL, "evaluated": len(dev), "device": device, "threads": torch.get_num_threads()}
    metrics["versions"] = {name: version(name) for name in ("prefix-kernels", "torch", "transformers")}
    metrics["seconds"] = time.perf_counter() - started
    save_loss_curve(metrics["losses"], args.output / "loss.png", title=f"{OFFLINE_MODEL} on E2E, prefix only")
    generations = [
        {"mr": row["mr"], "references": row["references"], "before": old, "after": new}
        for row, old, new in zip(dev, texts_before, texts_after, strict=True)
    ]
    write_json_lines(args.output / "generations.jsonl", generations)
    write_metrics(args.output, metrics)
    show(generations, metrics)
    say(f"written to {args.output}: prefix/, metrics.json, generations.jsonl, loss.png")
    return 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything written")
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=4, help="references a step")
    parser.add_argument("--prefix-len", type=int, default=16, help="positions of the prefix")
    parser.add_argument("--lr", dest="learning_rate", type=float, default=3e-2, help="highest learning rate")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises")
    parser.add_argument("--evaluate", type=int, default=60, help="meaning representations to score, drawn with seed 0")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="longest text")
    parser.add_argument("--seed", type=int, default=0, help="of the training rows and their order")
    return parser.parse_args(argv)


def show(generations: list[dict], metrics: dict) -> None:
    for row in generations[:SHOWN]:
        print(f"\n  {linearize(row['mr'])}\n    before: {row['before']}\n    after:  {row['after']}")
    percent = {name: f"{metrics[name]:6.1%}" for name in metrics if name.startswith("slot_error")}
    print(f"""
                                            before    after
  BLEU (lower case, all references)         {metrics["bleu_before"]:6.1f}   {metrics["bleu_after"]:6.1f}
  slots left out of the text                {percent["slot_error_before"]}   {percent["slot_error_after"]}
    people, typical (median) reference               {percent["slot_error_references"]}
    people, mean over all references                 {percent["slot_error_references_mean"]}

  {metrics["trainable_parameters"]:,} parameters trained, {metrics["trainable_share"]:.2%} of all; \
{metrics["seconds_per_step"]:.2f} s a step, {metrics["seconds"] / 60:.1f} min in all; \
attention backend {metrics["backend"]}
""")


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
