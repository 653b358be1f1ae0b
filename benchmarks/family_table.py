"""Which model family does what with a prefix: the outcomes of tests/prefix_tuning/test_families.py beside PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tables

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "prefix_tuning"
OURS, PEFT = FOLDER / "family_support.json", FOLDER / "peft_support.json"

TITLES = {
    "bloom": "Bloom", "cohere2": "Cohere2", "deepseek_v2": "DeepSeek V2", "deepseek_v3": "DeepSeek V3", "falcon": "Falcon",
    "falcon_alibi": "Falcon (ALiBi)", "falcon_mqa": "Falcon (MQA)", "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3",
    "gemma4": "Gemma4 (text)", "glm4": "GLM4", "gpt2": "GPT-2", "gpt_bigcode": "GPT-BigCode", "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX", "gpt_oss": "gpt-oss", "gptj": "GPT-J", "granite": "Granite", "llama": "Llama",
    "llama4": "Llama 4 (text)", "llama4_temperature": "Llama 4 (temperature tuning)", "mistral": "Mistral (window)",
    "mistral_full": "Mistral", "mixtral": "Mixtral", "mpt": "MPT", "olmo2": "OLMo2", "opt": "OPT", "phi": "Phi",
    "phi3": "Phi3", "qwen2": "Qwen2", "qwen2_moe": "Qwen2-MoE", "qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next", "smollm3": "SmolLM3", "stablelm": "StableLM",
}  # fmt: skip
# Of each column the capabilities that it stands for; a mark for all of them.
COLUMNS = {
    "forward, loss, gradients": ["forward, loss, gradients"],
    "greedy, beams, sampling": ["greedy", "beams", "sampling"],
    "left padding": ["left padding"],
    "… with `position_ids`": ["left padding, position_ids given"],
    "static cache": ["static cache"],
    "`use_cache=False`": ["use_cache=False"],
    "gradient checkpointing": ["gradient checkpointing"],
    "packing": ["packing"],
    "`torch.compile`": ["torch.compile"],
}
MARKS = {"yes": "✓", "wrong": "✗", "fails": "fails", "refused": "refused", "not possible": "–"}


def family_table() -> str:
    """One row for the families that have the same marks, first those that have them all."""
    ours, peft = (json.loads(path.read_text(encoding="utf-8")) for path in (OURS, PEFT))
    of_peft = {name: group["marks"] for group in peft["groups"] for name in group["families"]}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, outcomes in ours["families"].items():
        marks = [(_mark(outcomes, names), _mark(of_peft.get(name, {}), names)) for names in COLUMNS.values()]
        rows.setdefault(tuple(" · ".join(filter(None, both)) for both in marks), []).append(TITLES[name])
    ordered = sorted(rows.items(), key=lambda row: (-len(row[1]), row[1]))
    return (
        f"{tables.table(('model family', *COLUMNS), [(', '.join(names), *cells) for cells, names in ordered])}\n\n"
        f"First ours (transformers {ours['transformers']}), then PEFT's ({peft['source']}). ✓ right, ✗ silently wrong; fails: "
        "with an error from within; refused: with the reason; –: the plain model cannot do it either. One mark is ours."
    )


def _mark(outcomes: dict[str, Any], names: list[str]) -> str:
    """The mark that the capabilities have, the worst of them where they differ; "" where nothing is known."""
    found = {MARKS[outcomes[name].split(":")[0]] for name in names if name in outcomes}
    return max(found, key=list(MARKS.values()).index, default="")
