"""Tiny random encoders of every served family with the heads of three tasks, and what a test must know of each."""

import torch
import transformers

VOCABULARY = 96
LABELS = 3
TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
_BERT = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 40,
    "initializer_range": 0.2,
}  # fmt: skip
_CLASSES = {
    "bert": ("Bert", _BERT),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40,
                                  "initializer_range": 0.2}),
    "electra": ("Electra", _BERT | {"embedding_size": 24}),
    "modernbert": ("ModernBert", _BERT | {"local_attention": 4, "global_attn_every_n_layers": 3, "cls_token_id": 1,
                                          "sep_token_id": 2}),
    "roberta": ("Roberta", _BERT),
    "xlm-roberta": ("XLMRoberta", _BERT),
}  # fmt: skip
FAMILIES = tuple(_CLASSES)


def tiny_encoder(family: str, task: str = "SequenceClassification", **changes):
    """3 layers, 4 heads of 8, seed 0, in eval mode; ModernBERT with two layers of local attention (two tokens each way)."""
    torch.manual_seed(0)
    name, sizes = _CLASSES[family]
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 1 if "roberta" in family else 0, "num_labels": LABELS} | sizes
    if task == "QuestionAnswering":
        sizes["num_labels"] = 2
    return getattr(transformers, f"{name}For{task}")(getattr(transformers, f"{name}Config")(**sizes | changes)).eval()


def attention_of(model) -> list:
    """The self-attention modules, in the order of the layers."""
    base = model.base_model
    if model.config.model_type == "modernbert":
        return [layer.attn for layer in base.layers]
    if model.config.model_type == "distilbert":
        return [layer.attention for layer in base.transformer.layer]
    return [layer.attention.self for layer in base.encoder.layer]


def inputs_of(model, side: str | None = None, batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Tokens, row 0 with three of padding on `side`, and what the task learns from."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if side is not None:
        mask[0, slice(3) if side == "left" else slice(-3, None)] = 0
    inputs = {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id), "attention_mask": mask}
    name = type(model).__name__
    if "QuestionAnswering" in name:
        return inputs | {"start_positions": torch.tensor([4, 1]), "end_positions": torch.tensor([5, 3])}
    shape = (batch,) if "Sequence" in name else (batch, length)
    return inputs | {"labels": torch.randint(model.config.num_labels, shape, generator=generator)}


def positions_of(model, mask: torch.Tensor, offset: int) -> torch.Tensor:
    """Where the tokens stand behind a prefix: padding takes no position; RoBERTa counts from the padding's id + 1."""
    first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
    return (mask.cumsum(-1) - 1).clamp(min=0) + first + offset


def logits_of(outputs) -> torch.Tensor:
    if "logits" in outputs:
        return outputs.logits
    return torch.stack([outputs.start_logits, outputs.end_logits], -1)
