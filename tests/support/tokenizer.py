"""A tiny tokenizer made in memory: every printable ASCII character, some pairs of letters, 128 ids as the tiny models have."""

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIALS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
PAIRS = [
    "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or",
    "te", "of", "ed", "is", "it", "al", "ar", "st", "to", "nt", "ng", "se", "ha",
]  # fmt: skip

# Each turn as "role: content</s>" and a line break; an answer is opened with "assistant: ".
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer(
    *, bos: bool = False, eos: bool = True, adds_eos: bool = False, pad: bool = True, chat_template: str | None = None
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with ids 0 … 127 (pad 0, bos 1, eos 2 as in tiny_model), lossless on printable ASCII, \\t, \\n and \\r.

    It merges PAIRS, so tokens depend on what stands beside them. Other characters become <unk>.

    bos        <s> opens every text that is tokenised with special tokens; without, there is no such token
    eos, pad   </s> and <pad> are the tokenizer's end-of-text and padding token; without, it has none
    adds_eos   </s> closes every text that is tokenised with special tokens
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = [byte_level.pre_tokenize_str(chr(code))[0][0] for code in (9, 10, 13, *range(32, 127))]
    tokens = [*SPECIALS, *characters, *PAIRS]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in PAIRS], unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = byte_level, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    if bos or adds_eos:
        form = ["<s>"] * bos + ["$A"] + ["</s>"] * adds_eos
        backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=list(SPECIALS.items()))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>" if bos else None, eos_token="</s>" if eos else None,
        pad_token="<pad>" if pad else None, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer
