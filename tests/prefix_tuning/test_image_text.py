"""Models that wrap a text model: with text alone they do what any causal model does, and with images no less."""

import itertools

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModel
from transformers.masking_utils import blockwise_overlay, create_causal_mask, sliding_window_overlay

from prefix_tuning import Prefix, PrefixBank, accelerate_peft, attach_prefix
from prefix_tuning.doctor import model_report
from prefix_tuning.multimodal_families import MULTIMODAL
from prefix_tuning.offline_model import load_model_and_tokenizer
from prefix_tuning.own_cache import LEAST_REPLAYED
from support.capabilities import CAPABILITIES, GREEDY, NEW_TOKENS, TOLERANCE, Case, NotPossible, mean_loss
from support.checkpointing import counted_attention, train_with_checkpointing
from support.generation import CACHE
from support.image_text import EVERY, SIMILAR, WRAPPERS, batch_with_image, row_of, tiny_wrapper, with_token
from support.models import COMMON, MODELS, random_prefix, tiny_model
from support.peft_models import twins
from support.reference import Concatenation, PastKeyValues
from support.tokenizer import tiny_tokenizer
from support.training import losses, make_trainer

PREFIX_LEN = 5
WITH_LOGITS = {"output_logits": True, "return_dict_in_generate": True}
ASK_FOR_A_MASK = ("paligemma", "paligemma2")
TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder")
# Compiling takes seconds: one wrapper that makes its masks itself, one that does nothing, one with positions of its own.
COMPILED = ("gemma3", "llava", "qwen2_5_vl")
TEXT_ALONE = [
    (name, capability)
    for name, capability in itertools.product([name for name in WRAPPERS if name not in ASK_FOR_A_MASK], CAPABILITIES)
    if capability != "torch.compile" or name in COMPILED
] + list(itertools.product(SIMILAR, ("forward, loss, gradients", "left padding")))


def wrapper(name, **changes):
    """The tiny model; a skip where this transformers cannot run it even without a prefix."""
    try:
        tiny_wrapper(name)(**batch_with_image(name, 1))
    except AttributeError as error:
        pytest.skip(f"transformers {transformers.__version__} does not run {EVERY[name].name}: {error}")
    return tiny_wrapper(name, **changes)


@pytest.mark.parametrize("name, capability", TEXT_ALONE)
def test_text_alone(name, capability):
    model = wrapper(name)
    try:
        CAPABILITIES[capability](Case({"kimi_k25": "deepseek_v3", "lfm2_vl": "lfm2"}.get(name, name), model))
    except NotPossible as reason:
        assert (name, capability) in {("qwen2_vl", "packing"), ("qwen2_5_vl", "packing")} or "static" in str(reason)
        pytest.skip(f"transformers {transformers.__version__}: {EVERY[name].name} alone cannot do it: {reason}")
    except NotImplementedError as refusal:
        assert (name, capability) == ("llama4", "packing") and "under chunked attention" in str(refusal)


@pytest.mark.parametrize("capability", ("forward, loss, gradients", "left padding", "static cache"))
def test_text_alone_beside_towers_that_are_not_installed(capability, monkeypatch):
    """Gemma 3n, whose tower for images is timm's."""
    module = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")

    class TextAlone:
        @staticmethod
        def from_config(config):
            return AutoModel.from_config(config) if config.model_type == "gemma3n_text" else torch.nn.Identity()

    monkeypatch.setattr(module, "AutoModel", TextAlone)
    torch.manual_seed(0)
    config = module.Gemma3nConfig(text_config=COMMON | MODELS["gemma3n"][1])
    case = Case("gemma3n_wrapped", module.Gemma3nForConditionalGeneration(config).eval())
    CAPABILITIES[capability](case)


class ImageCase:
    """A wrapper, a random prefix, a batch with an image in its padded row or in its other one, and the rows alone."""

    def __init__(self, name, padded=False):
        self.name, self.model = name, wrapper(name)
        self.prefix, self.batch = random_prefix(self.model, PREFIX_LEN), batch_with_image(name, 0 if padded else 1)
        self.mask = torch.ones_like(self.batch["input_ids"])
        self.rows = [row_of(self.batch, 0), row_of(self.batch, 1)]
        if padded:
            self.mask[0, :3] = 0
            self.rows[0] = row_of(self.batch, 0, 3)
            self.batch["attention_mask"] = self.mask

    def forward(self, row):
        return Concatenation().forward(self.model, self.prefix, **row).logits[0]

    def expected(self):
        """The rows' logits, their loss and the prefix's gradients."""
        logits = [self.forward(row) for row in self.rows]
        loss = self.loss(torch.cat(logits))
        return torch.cat(logits), loss, self.gradients(loss)

    def loss(self, logits):
        """logits: of all tokens but padding."""
        rows = [row["input_ids"] for row in self.rows]
        return mean_loss(logits.split([row.shape[1] for row in rows]), rows)

    def gradients(self, loss):
        return torch.autograd.grad(loss, list(self.prefix.parameters()))

    def equal(self, got, expected):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("padded", (False, True), ids=("image", "image in a padded row"))
@pytest.mark.parametrize("name", EVERY)
def test_forward(name, padded):
    case = ImageCase(name, padded)
    logits, loss, gradients = case.expected()
    with attach_prefix(case.model, case.prefix):
        got = case.model(**case.batch).logits
        case.equal(got[case.mask.bool()], logits)
        case.equal(case.loss(got[case.mask.bool()]), loss)
        case.equal(case.gradients(case.loss(got[case.mask.bool()])), gradients)
        other = case.model(**case.batch | {"pixel_values": case.batch["pixel_values"].flip(-1)}).logits
    assert (other - got).abs().max() > 1e-2, "the image does not matter"
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)


@pytest.mark.parametrize(
    "name, options",
    [*itertools.product(WRAPPERS, ({}, {"cache_implementation": "static"}, {"use_cache": False})),
     *itertools.product(SIMILAR, ({},))],
    ids=str,
)  # fmt: skip
def test_greedy(name, options):
    case = ImageCase(name, padded=True)
    if options:
        _skip_unless_the_plain_model_can(case, options)
    tokens, logits = [], []
    for row in case.rows:
        taken = []
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                taken.append(case.forward(row)[None, -1])
                row = with_token(name, row, taken[-1].argmax(-1))
        tokens.append(row["input_ids"][0, -NEW_TOKENS:])
        logits.append(torch.cat(taken))
    with attach_prefix(case.model, case.prefix):
        got = case.model.generate(**case.batch, **WITH_LOGITS, **GREEDY | options)
    assert torch.equal(got.sequences[:, -NEW_TOKENS:], torch.stack(tokens))
    case.equal(torch.stack(got.logits), torch.stack(logits, 1))


def _skip_unless_the_plain_model_can(case, options):
    version = f"transformers {transformers.__version__}: {type(case.model).__name__} alone"
    expected = case.model.generate(**case.batch, **WITH_LOGITS, **GREEDY)
    try:
        found = case.model.generate(**case.batch, **WITH_LOGITS, **GREEDY | options)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"{version} fails with {options}: {error}")
    if not torch.allclose(torch.stack(found.logits), torch.stack(expected.logits), **TOLERANCE):
        pytest.skip(f"{version} gives other logits with {options}")


@pytest.mark.parametrize("name", WRAPPERS)
def test_turns(name):
    """Two more tokens over the cache of a call with an image."""
    case = ImageCase(name)
    rows, expected = case.rows, []
    for token in (7, 8):
        rows = [with_token(name, row, torch.tensor([token])) for row in rows]
    expected = torch.stack([case.forward(row) for row in rows])
    with attach_prefix(case.model, case.prefix):
        first = case.model(**case.batch, use_cache=True)
        second = case.model(input_ids=torch.tensor([[7, 8]] * 2), use_cache=True, **{CACHE: first[CACHE]})
    case.equal(torch.cat([first.logits, second.logits], 1), expected)


@pytest.mark.parametrize("name", WRAPPERS)
def test_checkpointing(name):
    case = ImageCase(name)
    logits, _, gradients = case.expected()
    train_with_checkpointing(case.model)
    with attach_prefix(case.model, case.prefix), counted_attention() as calls:
        got = case.model(**case.batch, use_cache=False).logits[case.mask.bool()]
        layers = len(calls)
        found = case.gradients(case.loss(got))
    assert len(calls) == 2 * layers > 0
    case.equal(got, logits)
    case.equal(found, gradients)


@pytest.mark.parametrize("name", ("gemma3", "gemma4", "paligemma2"))
def test_a_prefix_that_slides_out_of_windows(name):
    """As past_key_values, where token types are read from the first of them on."""
    case = ImageCase(name)
    types = "mm_token_type_ids" if name == "gemma4" else "token_type_ids"
    past = torch.full((2, PREFIX_LEN), int(name == "paligemma2"), dtype=case.batch[types].dtype)
    from_the_past_on = {types: torch.cat([past, case.batch[types]], 1)}
    expected = PastKeyValues().forward(case.model, case.prefix, **case.batch | from_the_past_on).logits
    with attach_prefix(case.model, case.prefix, prefix_window="peft"):
        case.equal(case.model(**case.batch).logits, expected)
    with attach_prefix(case.model, case.prefix):
        assert not torch.allclose(case.model(**case.batch).logits, expected, **TOLERANCE)


def test_windows_that_torch_compile_cannot_see_are_refused():
    model = wrapper("gemma3")

    def mask(embeds):
        functions = {"or_mask_function": blockwise_overlay(types), "and_mask_function": sliding_window_overlay(8)}
        return create_causal_mask(model.config.get_text_config(), embeds, None, None, **functions)

    embeds, types = torch.zeros(1, 12, 64), torch.tensor([[-1] * 4 + [0] * 4 + [-1] * 4])
    with attach_prefix(model, random_prefix(model, PREFIX_LEN), prefix_window="peft"):
        structure, traced = mask(embeds), torch.compile(mask, backend="eager")(embeds)
    torch.testing.assert_close(traced.bias, structure.bias)
    query = (PREFIX_LEN, PREFIX_LEN, torch.arange(12)[None], 12, 12, torch.float32, embeds.device)
    assert structure.local == 8 and structure.sliding(*query)[1].isinf().sum() > (~structure.bias).sum()
    with pytest.raises(NotImplementedError, match="'peft' is not served by torch.compile for masks"):
        traced.sliding(*query)


@pytest.mark.parametrize("name", EVERY)
def test_towers_stay_as_they_are(name):
    """Their configs are the same objects, which no other model sees changed, and so are their features."""
    case, features = ImageCase(name), []
    tower = next(m for path, m in case.model.named_modules() if path.endswith(TOWERS))
    modules = [module for module in tower.modules() if hasattr(module, "config")]
    configs, implementation = [module.config for module in modules], case.model.config.vision_config._attn_implementation
    hook = tower.register_forward_hook(lambda module, args, output: features.append(output[0]))
    case.model(**case.batch)
    with attach_prefix(case.model, case.prefix):
        case.model(**case.batch)
        assert all(module.config is config for module, config in zip(modules, configs, strict=True))
        assert not any(hasattr(module, "layer_prefix") for module in tower.modules())
        assert case.model.config.vision_config._attn_implementation == implementation == tower.config._attn_implementation
    hook.remove()
    assert torch.equal(*features)


@pytest.mark.parametrize("name", EVERY)
def test_bank(name):
    """Rows with a prefix and without one, an image among them; also over beams."""
    case = ImageCase(name)
    options = GREEDY | {"num_beams": 2}
    try:
        without, plain = case.model(**case.batch).logits, case.model.generate(**case.batch, **options)
    except RuntimeError as error:
        pytest.skip(f"transformers {transformers.__version__}: {EVERY[name].name} alone fails over beams: {error}")
    with attach_prefix(case.model, case.prefix):
        with_prefix, tokens = case.model(**case.batch).logits, case.model.generate(**case.batch, **options)
    bank = PrefixBank({"one": case.prefix, "other": random_prefix(case.model, 3)})
    with attach_prefix(case.model, bank):
        for names in (["one", None], [None, "one"]):
            chosen = torch.tensor([name is not None for name in names])[:, None]
            got = case.model(**case.batch, prefix_ids=names).logits
            case.equal(got, torch.where(chosen[..., None], with_prefix, without))
            generated = case.model.generate(**case.batch, **options, prefix_ids=names)
            assert torch.equal(generated, torch.where(chosen, tokens, plain))


@pytest.mark.parametrize("name", WRAPPERS)
def test_text_as_a_prefix(name):
    """A real text's keys and values give what the text gives in front of every row."""
    model, tokens = wrapper(name), torch.randint(3, 100, (1, PREFIX_LEN))
    prefix = Prefix.from_text(model, None, input_ids=tokens)
    rows = torch.randint(3, 100, (2, 7))
    types = {"token_type_ids": torch.ones(2, 7, dtype=torch.long)} if name in ASK_FOR_A_MASK else {}
    longer = {key: torch.ones(2, PREFIX_LEN + 7, dtype=torch.long) for key in types}
    expected = model(input_ids=torch.cat([tokens.expand(2, -1), rows], 1), **longer).logits[:, PREFIX_LEN:]
    with attach_prefix(model, prefix, prefix_window="peft"):
        torch.testing.assert_close(model(input_ids=rows, **types).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("name", WRAPPERS)
def test_saved_and_loaded(name, tmp_path):
    model = wrapper(name)
    prefix = random_prefix(model, PREFIX_LEN)
    prefix.save(tmp_path)
    loaded = Prefix.load(tmp_path)
    loaded.check_fits(model)
    for pair, other in zip(prefix.layers(), loaded.layers(), strict=True):
        assert all(map(torch.equal, pair, other))
    with pytest.raises(ValueError, match="expected one for"):
        loaded.check_fits(tiny_wrapper("llava", num_hidden_layers=2))


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name not in ASK_FOR_A_MASK])
def test_training(name, tmp_path):
    """Rows of text; the frozen model stays as it is."""
    model = wrapper(name, vocab_size=512)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prefix = random_prefix(model, PREFIX_LEN)
    start = prefix.layers()[0][0].clone()
    trainer = make_trainer(tmp_path, model, prefix, max_steps=2)
    trainer.train()
    trainer.detach()
    assert trainer.max_length == 128 - PREFIX_LEN
    assert len(losses(trainer)) == 2 and not torch.equal(start, prefix.layers()[0][0])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ("gemma3", "paligemma", "qwen2_5_vl"))
def test_training_with_images(name, tmp_path):
    """A collator of the caller's brings them; the first loss is that of the last three tokens."""
    case = ImageCase(name)
    labels = case.batch["input_ids"].clone()
    labels[:, :-3] = -100
    with torch.no_grad():
        logits = torch.stack([case.forward(row) for row in case.rows])
    options = {"data_collator": lambda rows: {key: value.clone() for key, value in case.batch.items()} | {"labels": labels}}
    trainer = make_trainer(tmp_path, case.model, case.prefix, [{"input_ids": [1]}] * 4, options, max_steps=2)
    trainer.train()
    trainer.detach()
    case.equal(torch.tensor(losses(trainer)[0]), cross_entropy(logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten()))
    assert losses(trainer)[1] != losses(trainer)[0]


@pytest.mark.parametrize("name", WRAPPERS)
def test_peft(name):
    """The tokens and logits of PEFT's own prefix tuning on text, which ignores token types, and its adapter as a prefix."""
    pytest.importorskip("peft")
    rival, model = twins(wrapper(name), PREFIX_LEN)
    rows = torch.randint(3, 100, (2, 7))
    expected = rival(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows)
    types = {"token_type_ids": torch.ones_like(rows)} if name in ASK_FOR_A_MASK else {}
    padded = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    plain = model.base_model(input_ids=rows, attention_mask=padded, **types).logits[padded.bool()]
    assert accelerate_peft(model) is model
    got = model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows)
    torch.testing.assert_close(got.logits, expected.logits, **TOLERANCE)
    (found,) = torch.autograd.grad(got.loss, [p for p in model.parameters() if p.requires_grad])
    (wanted,) = torch.autograd.grad(expected.loss, [p for p in rival.parameters() if p.requires_grad])
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    underneath = model.base_model(input_ids=rows, attention_mask=padded, **types).logits[padded.bool()]
    torch.testing.assert_close(underneath, plain, **TOLERANCE)
    if name == "gemma4":
        return  # whose layers differ in shape, as PEFT's do not
    with attach_prefix(rival.get_base_model(), Prefix.from_peft(rival), prefix_window="peft"):
        torch.testing.assert_close(rival.get_base_model()(input_ids=rows, **types).logits, got.logits, **TOLERANCE)


def test_calls_underneath_a_peft_model_are_without_our_positions():
    pytest.importorskip("peft")
    _, model = twins(wrapper("gemma3"), PREFIX_LEN)
    rows, positions = torch.randint(3, 100, (2, 7)), []
    accelerate_peft(model)
    decoder = model.get_base_model().get_decoder()
    hook = decoder.register_forward_hook(
        lambda module, args, kwargs, output: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    for side in (model.base_model, model):
        side(input_ids=rows, attention_mask=torch.tensor([[0] * 3 + [1] * 4, [1] * 7]))
    hook.remove()
    assert positions[0] is None and positions[1].tolist()[0] == [5, 5, 5, 5, 6, 7, 8]


def test_a_prompt_whose_mask_would_be_anyones_guess_is_refused():
    case = ImageCase("paligemma")
    types = case.batch.pop("token_type_ids")
    with attach_prefix(case.model, case.prefix):
        with pytest.raises(ValueError, match="token_type_ids: expected int .*, got none, by which PaliGemmaModel leaves it"):
            case.model(**case.batch)
        with pytest.raises(ValueError, match="token_type_ids: expected int .*, got none"):
            case.model.generate(**case.batch, **GREEDY)
        case.model.generate(**case.batch, token_type_ids=types, **GREEDY)


@pytest.mark.parametrize("name", ("gemma3", "llava"))
def test_commands_know_the_model(name, tmp_path):
    """transformers counts Gemma 3 among causal models, LLaVA not."""
    model = wrapper(name, vocab_size=512)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model_and_tokenizer(str(tmp_path))
    assert type(loaded) is type(model)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    report = model_report(str(tmp_path))
    assert "decoder: 3 layers, 2 kv_heads, head_dim 16" in report and ("a window of 8" in report) is (name == "gemma3")


def test_every_row_is_tested():
    assert MULTIMODAL.keys() == EVERY.keys() - {"llava_mistral", "paligemma2"} | {"gemma3n"}


def test_wrappers_without_a_row_are_refused():
    model = tiny_model("llama")
    model.config.model_type = "no_such_wrapper"
    with pytest.raises(NotImplementedError, match="model: expected one of type .*, got 'no_such_wrapper'"):
        Prefix.for_model(model, 4)
    config = tiny_wrapper("llava").config
    config.text_config.model_type = "rwkv"
    model.config = config
    with pytest.raises(NotImplementedError, match="got 'llava' around 'rwkv'"):
        Prefix.for_model(model, 4)


@pytest.mark.parametrize("kind", ("prefix", "bank"))
@pytest.mark.parametrize("name", WRAPPERS)
def test_replayed_steps(name, kind, graphs):
    """As on a GPU: the steps after a prompt with an image, over a static cache, are recorded once and replayed."""
    case = ImageCase(name, padded=True)
    options = GREEDY | {"cache_implementation": "static"}
    _skip_unless_the_plain_model_can(case, options | {"disable_compile": True})
    attached = case.prefix if kind == "prefix" else PrefixBank({"one": case.prefix}, default="one")
    with attach_prefix(case.model, attached):
        expected = case.model.generate(**case.batch, **options, disable_compile=True)
        assert torch.equal(case.model.generate(**case.batch, **options), expected)
    counted_by_python = CACHE != "cache" and name.startswith("qwen")  # before transformers 5.24, of which nothing is recorded
    assert graphs.replays == (0 if counted_by_python else NEW_TOKENS - 2)


@pytest.mark.parametrize("name", ("gemma3", "gemma4", "paligemma2"))
def test_a_static_cache_of_generates_own(name, graphs):
    """Only where the model gives the same over one: Gemma 4 with images does not everywhere, PaliGemma cannot be recorded."""
    case = ImageCase(name, padded=True)
    with attach_prefix(case.model, case.prefix):
        options = GREEDY | {"max_new_tokens": LEAST_REPLAYED}
        expected = case.model.generate(**case.batch, **options, return_dict_in_generate=True).sequences
        assert torch.equal(case.model.generate(**case.batch, **options), expected)
    assert (graphs.replays > 0) is (name == "gemma3")
