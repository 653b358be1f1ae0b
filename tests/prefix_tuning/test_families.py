"""Every family and every capability against a reference, and the table of what works (README), which is made from these tests.

`pytest tests/prefix_tuning/test_families.py --update-support` writes family_support.json; then benchmarks/report.py.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.bloom import modeling_bloom
from transformers.models.mpt import modeling_mpt

from prefix_tuning import Prefix, PrefixBank, attach_prefix
from prefix_tuning.families import FAMILIES, REFUSED
from prefix_tuning.masks import MaskStructure
from prefix_tuning.patched_attention import alibi_slopes
from prefix_tuning.stacks import attention_kinds
from support.capabilities import CAPABILITIES, TOLERANCE, Case, NotPossible, ids
from support.models import ALIASES, MODELS, WITH_STATE, random_prefix, tiny_model

SUPPORT = Path(__file__).with_name("family_support.json")


def outcome(name: str, capability: str) -> str:
    """Either "yes" or why not: refused by us, or beyond the plain model. Anything that is wrong raises."""
    try:
        CAPABILITIES[capability](Case(name))
    except NotImplementedError as refusal:
        return f"refused: {refusal}"
    except NotPossible as reason:
        return f"not possible: {reason}"
    return "yes"


@pytest.fixture(scope="module")
def support(request):
    """The committed outcomes; with --update-support, the new ones, written when all are there."""
    recorded = json.loads(SUPPORT.read_text()) if SUPPORT.exists() else {}
    if not request.config.getoption("--update-support"):
        yield recorded
        return
    found = {"transformers": transformers.__version__, "families": {name: {} for name in MODELS}}
    yield found
    missing = [name for name, outcomes in found["families"].items() if len(outcomes) != len(CAPABILITIES)]
    assert not missing, f"not written, without outcomes of {missing}"
    temporary = SUPPORT.with_suffix(".tmp")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(SUPPORT)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MODELS)
def test_capability(name, capability, support, request):
    found = outcome(name, capability)
    if request.config.getoption("--update-support"):
        support["families"][name][capability] = found
    elif support["transformers"] == transformers.__version__:
        assert found == support["families"][name][capability]
    else:  # what the plain model cannot do may differ from version to version
        assert found == "yes" or found.startswith("not possible") or support["families"][name][capability] != "yes"


@pytest.mark.parametrize("capability", ("forward, loss, gradients", "greedy", "left padding"))
@pytest.mark.parametrize("name", ALIASES)
def test_a_family_with_the_classes_of_another(name, capability):
    assert tiny_model(name).config.model_type == name
    assert outcome(name, capability) == "yes"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITH_STATE])
def test_real_tokens_as_a_prefix_equal_the_plain_model(name):
    model, tokens, input_ids = tiny_model(name), ids(1, 5, seed=2), ids()
    prefix = Prefix.from_text(model, None, input_ids=tokens)
    expected = model(input_ids=torch.cat([tokens.expand(2, -1), input_ids], 1)).logits[:, 5:]
    with attach_prefix(model, prefix, prefix_window="peft"):
        torch.testing.assert_close(model(input_ids=input_ids).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", WITH_STATE)
def test_layers_with_a_state_have_no_text_as_prefix(name):
    with pytest.raises(NotImplementedError, match="a text leaves more than keys and values"):
        Prefix.from_text(tiny_model(name), None, input_ids=ids(1, 5))


def test_a_bank_of_prefixes_whose_layers_differ():
    model = tiny_model("gemma4")
    prefix, input_ids = random_prefix(model), ids()
    with attach_prefix(model, prefix):
        expected = model(input_ids=input_ids).logits
    with attach_prefix(model, PrefixBank({"a": prefix})):
        torch.testing.assert_close(model(input_ids=input_ids, prefix_ids=["a", "a"]).logits, expected, **TOLERANCE)


def test_a_bank_is_refused_where_layers_do_not_hand_on_its_ids():
    model = tiny_model("bloom")
    with pytest.raises(NotImplementedError, match="a bank is not served, as BloomForCausalLM hands no further"):
        attach_prefix(model, PrefixBank({"a": random_prefix(model)}))
    attach_prefix(model, random_prefix(model)).detach()


@pytest.mark.parametrize("name", ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt", "xglm"))
def test_a_table_of_positions_that_is_too_short_is_refused(name):
    model = tiny_model(name)
    with attach_prefix(model, random_prefix(model, 5)):
        model(input_ids=ids(1, 59))
        with pytest.raises(ValueError, match="the model's 64 position embeddings .*, got 65 positions"):
            model(input_ids=ids(1, 60))


def test_attention_that_would_not_see_the_prefix_is_refused(monkeypatch):
    model = tiny_model("llama")
    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr(attention, "forward", lambda self, hidden_states, **kwargs: (hidden_states, None))
    before = dict(vars(model.config))
    with pytest.raises(NotImplementedError, match="LlamaAttention does not call transformers' attention interface"):
        attach_prefix(model, random_prefix(model))
    assert vars(model.config) == before and not any("layer_prefix" in vars(module) for module in model.modules())


def test_another_attention_implementation_afterwards_is_refused():
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model)):
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="attn_implementation: set to 'eager' while a prefix is attached"):
            model(input_ids=ids())
    model(input_ids=ids())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", REFUSED)
def test_families_that_cannot_be_served_are_refused_with_the_reason(model_type):
    assert model_type not in FAMILIES
    config = transformers.CONFIG_MAPPING[model_type]()
    with pytest.raises(NotImplementedError, match=f"a prefix cannot be attached to {model_type}: {REFUSED[model_type]}"):
        attention_kinds(config)
    model = tiny_model("llama")
    prefix = random_prefix(model)
    model.config = config
    with pytest.raises(NotImplementedError, match=REFUSED[model_type]):
        attach_prefix(model, prefix)


def test_a_model_none_of_whose_layers_has_attention_is_refused():
    with pytest.raises(NotImplementedError, match="nothing would see a prefix, as BambaConfig has no layer with attention"):
        Prefix.for_model(tiny_model("bamba", attn_layer_indices=[]), 5)


@pytest.mark.parametrize("packed", (False, True), ids=("one sequence", "packed"))
def test_queries_that_are_dropped_before_shared_layers(packed):
    """Gemma 4 cuts its masks to the queries whose logits are asked for."""
    model, input_ids = tiny_model("gemma4"), ids()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2) if packed else None
    with attach_prefix(model, random_prefix(model)):
        whole = model(input_ids=input_ids, position_ids=positions, use_cache=False).logits
        last = model(input_ids=input_ids, position_ids=positions, use_cache=False, logits_to_keep=2).logits
    torch.testing.assert_close(last, whole[:, -2:], **TOLERANCE)
    with pytest.raises(NotImplementedError, match="cannot be taken apart"):
        MaskStructure(causal=True)[:, :, :1, :]


@pytest.mark.parametrize("heads", (1, 6, 8, 12, 14))
def test_slopes_are_those_of_the_models(heads):
    slopes = alibi_slopes(heads, torch.device("cpu"))
    torch.testing.assert_close(slopes, modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1])
    torch.testing.assert_close(-slopes, modeling_mpt.build_mpt_alibi_tensor(heads, 2)[:, 0, 0])


@pytest.mark.parametrize("default", (torch.float64, torch.bfloat16))
@pytest.mark.parametrize("name", ("bloom", "gemma3", "llama4", "mistral"))
def test_torch_s_default_dtype_changes_nothing(name, default):
    model = tiny_model(name)
    with torch.no_grad(), attach_prefix(model, random_prefix(model), prefix_window="peft"):
        inputs = {"input_ids": ids(length=12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
        inputs["attention_mask"][0, :3] = 0
        expected = model(**inputs).logits
        torch.set_default_dtype(default)
        try:
            torch.testing.assert_close(model(**inputs).logits[:, 3:], expected[:, 3:], **TOLERANCE)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "name", ("bloom", "deepseek_v3", "falcon_alibi", "gemma3", "gpt_neo", "gpt_oss", "llama4_temperature", "mpt")
)
def test_a_model_in_bfloat16(name):
    """Families whose attention has something of its own, beside a float32 prefix."""
    model, mask = tiny_model(name), torch.ones(2, 12, dtype=torch.long)
    prefix, mask[0, :3] = random_prefix(model), 0
    inputs = {"input_ids": ids(length=12), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        with attach_prefix(model, prefix):
            expected = model(**inputs).logits[mask.bool()]
        with attach_prefix(model.bfloat16(), prefix):
            got = model(**inputs).logits[mask.bool()]
    assert got.dtype == torch.bfloat16 and (got.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
