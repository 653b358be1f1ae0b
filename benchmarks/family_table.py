"""Which model family does what with a prefix: the outcomes of tests in tests/prefix_tuning beside PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tables

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "prefix_tuning"
OURS, ENCODERS, PEFT = (FOLDER / f"{name}_support.json" for name in ("family", "encoder", "peft"))

TITLES = {
    "afmoe": "AFMoE", "apertus": "Apertus", "arcee": "Arcee", "bamba": "Bamba", "biogpt": "BioGPT", "bitnet": "BitNet",
    "bloom": "Bloom", "codegen": "CodeGen", "cohere": "Cohere", "cohere2": "Cohere2", "cohere2_moe": "Cohere2-MoE",
    "cwm": "CWM", "deepseek_v2": "DeepSeek V2", "deepseek_v3": "DeepSeek V3", "dots1": "dots.llm1", "ernie4_5": "ERNIE 4.5",
    "ernie4_5_moe": "ERNIE 4.5-MoE", "exaone4": "EXAONE 4", "exaone_moe": "EXAONE-MoE", "falcon": "Falcon",
    "falcon_alibi": "Falcon (ALiBi)", "falcon_h1": "Falcon-H1", "falcon_mqa": "Falcon (MQA)", "flex_olmo": "FlexOlmo",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3": "Gemma3", "gemma3n": "Gemma 3n (text)", "gemma4": "Gemma4 (text)",
    "gemma4_unified": "Gemma4 Unified (text)", "glm": "GLM", "glm4": "GLM4", "glm4_moe": "GLM4-MoE",
    "glm4_moe_lite": "GLM4-MoE-Lite", "gpt2": "GPT-2", "gpt_bigcode": "GPT-BigCode", "gpt_neo": "GPT-Neo",
    "gpt_neox": "GPT-NeoX", "gpt_oss": "gpt-oss", "gptj": "GPT-J", "granite": "Granite", "granitemoe": "Granite-MoE",
    "granitemoehybrid": "Granite-MoE-Hybrid", "granitemoeshared": "Granite-MoE-Shared", "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan", "hunyuan_v1_moe": "Hunyuan-MoE", "hyperclovax": "HyperCLOVA X", "jais2": "Jais 2",
    "jamba": "Jamba", "kimi_linear": "Kimi-Linear", "lfm2": "LFM2", "lfm2_moe": "LFM2-MoE", "llama": "Llama",
    "llama4": "Llama 4 (text)", "llama4_temperature": "Llama 4 (temperature tuning)", "longcat_flash": "LongCat-Flash",
    "mimo_v2_flash": "MiMo-V2-Flash", "minicpm3": "MiniCPM3", "minimax_m2": "MiniMax-M2", "ministral": "Ministral",
    "ministral3": "Ministral 3", "mistral": "Mistral (window)", "mistral_full": "Mistral", "mixtral": "Mixtral",
    "modernbert_decoder": "ModernBERT decoder", "mpt": "MPT", "nanochat": "nanochat", "nemotron": "Nemotron",
    "nemotron_h": "Nemotron-H", "olmo": "OLMo", "olmo2": "OLMo2", "olmo3": "OLMo3", "olmo_hybrid": "OLMo-Hybrid",
    "olmoe": "OLMoE", "opt": "OPT", "persimmon": "Persimmon", "phi": "Phi", "phi3": "Phi3", "phimoe": "Phi-MoE",
    "qwen2": "Qwen2", "qwen2_moe": "Qwen2-MoE", "qwen3": "Qwen3", "qwen3_5": "Qwen3.5", "qwen3_5_moe": "Qwen3.5-MoE",
    "qwen3_moe": "Qwen3-MoE", "qwen3_next": "Qwen3-Next", "seed_oss": "Seed-OSS", "smollm3": "SmolLM3",
    "solar_open": "Solar Open", "stablelm": "StableLM", "starcoder2": "StarCoder2", "vaultgemma": "VaultGemma", "xglm": "XGLM",
    "youtu": "Youtu-LLM",
    "bart": "BART", "m2m_100": "M2M100", "marian": "Marian", "mbart": "mBART", "mt5": "mT5", "pegasus": "Pegasus", "t5": "T5",
    "t5gemma": "T5Gemma", "whisper": "Whisper", "bert": "BERT", "deberta-v2": "DeBERTa-v2", "distilbert": "DistilBERT",
    "electra": "ELECTRA", "modernbert": "ModernBERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-RoBERTa",
}  # fmt: skip
# Of each column the capabilities that it stands for; a mark for all of them.
COLUMNS = {
    "forward, loss, gradients": ["forward, loss, gradients"],
    "greedy, beams, sampling": ["greedy", "beams", "sampling"],
    "left padding": ["left padding"],
    "… with `position_ids`": ["left padding, position_ids given"],
    "static cache": ["static cache"],
    "`use_cache=False`": ["use_cache=False"],
    "several turns": ["several turns"],
    "gradient checkpointing": ["gradient checkpointing"],
    "packing": ["packing"],
    "`torch.compile`": ["torch.compile"],
}
PARTS = ("encoder", "decoder", "cross", "encoder, decoder, cross")
ENCODER_DECODER_COLUMNS = {
    "forward, loss, gradients: the decoder's prefix": ["forward, loss, gradients: decoder"],
    "… the encoder's, cross-attention's, all three": [f"forward, loss, gradients: {p}" for p in PARTS if p != "decoder"],
    "left, right padding": [f"left and right padding: {part}" for part in PARTS],
    "greedy, beams": ["greedy", "beams"],
    "static cache": ["static cache"],
    "`use_cache=False`": ["use_cache=False"],
    "gradient checkpointing": ["gradient checkpointing"],
    '`init="text"`': ["init='text'"],
}
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
ENCODER_COLUMNS = {
    **dict(zip(
        ("forward, loss, gradients: sequence classification", "… token classification", "… question answering"),
        ([f"forward, loss, gradients: {task}"] for task in TASKS), strict=True,
    )),
    "the head trained, saved, loaded": [f"head: {task}" for task in TASKS],
    "left, right padding": [f"left and right padding: {task}" for task in TASKS],
    "gradient checkpointing": ["gradient checkpointing"],
    "`init=\"text\"`": ["init='text'"],
}  # fmt: skip
MARKS = {"yes": "✓", "wrong": "✗", "fails": "fails", "refused": "refused", "not possible": "–"}


def family_table() -> str:
    """Causal models: a sentence for those that have every mark and of which nothing is recorded of PEFT, then the others."""
    ours, peft = (json.loads(path.read_text(encoding="utf-8")) for path in (OURS, PEFT))
    of_peft = {name for group in peft["groups"] for name in group["families"]}

    def whole(name: str) -> bool:
        outcomes = ours["families"][name]
        return name not in of_peft and all(_mark(outcomes, names) == MARKS["yes"] for names in COLUMNS.values())

    listed = [name for name in ours["families"] if whole(name)]
    others = {name: outcomes for name, outcomes in ours["families"].items() if name not in listed}
    titles = ", ".join(TITLES[name] for name in listed)
    sentence = f"{len(listed)} families are right in every column below: {titles}. The others:"
    return "\n\n".join([sentence, _table("model family", COLUMNS, others, peft), _legend(ours, peft)])


def encoder_tables() -> str:
    """Encoder-decoders, then encoders: whoever has a decoder's prefix is one of the former."""
    ours, peft = (json.loads(path.read_text(encoding="utf-8")) for path in (ENCODERS, PEFT))
    both = {name: outcomes for name, outcomes in ours["families"].items() if "greedy" in outcomes}
    alone = {name: outcomes for name, outcomes in ours["families"].items() if name not in both}
    shown = [
        _table("encoder-decoder", ENCODER_DECODER_COLUMNS, both, peft), _table("encoder", ENCODER_COLUMNS, alone, peft),
        _legend(ours, peft) + " PEFT knows the decoder's prefix alone, and is wrong where the number of layers is even.",
    ]  # fmt: skip
    return "\n\n".join(shown)


def _table(kind: str, columns: dict[str, list[str]], families: dict[str, dict[str, str]], peft: dict[str, Any]) -> str:
    """One row for the families that have the same marks, first those that have them all."""
    of_peft = {name: group["marks"] for group in peft["groups"] for name in group["families"]}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, outcomes in families.items():
        marks = [(_mark(outcomes, names), _mark(of_peft.get(name, {}), names)) for names in columns.values()]
        rows.setdefault(tuple(" · ".join(filter(None, both)) for both in marks), []).append(TITLES[name])
    ordered = sorted(rows.items(), key=lambda row: (-len(row[1]), row[1]))
    return tables.table((kind, *columns), [(", ".join(names), *cells) for cells, names in ordered])


def _legend(ours: dict[str, Any], peft: dict[str, Any]) -> str:
    return (
        f"First ours (transformers {ours['transformers']}), then PEFT's ({peft['source']}). ✓ right, ✗ silently wrong; fails: "
        "with an error from within; refused: with the reason; –: the plain model cannot do it either. A single mark is ours: "
        "nothing is recorded of PEFT."
    )


def _mark(outcomes: dict[str, Any], names: list[str]) -> str:
    """The mark that the capabilities have, the worst of them where they differ; "" where nothing is known."""
    found = {MARKS[outcomes[name].split(":")[0]] for name in names if name in outcomes}
    return max(found, key=list(MARKS.values()).index, default="")
