"""generate with a static cache replays recorded steps; tokens are those of the plain steps, which run where none is."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import CompileConfig, StaticCache

from prefix_tuning import accelerate_peft, attach_prefix, cuda_graphs, graphed_decoding
from support.encoder_decoders import tiny_encoder_decoder
from support.generation import CACHE, KINDS, OPTIONS, STATIC, attach, ids, on_gpu, padded
from support.models import MODELS, WITH_STATE, random_prefix, tiny_model
from support.peft_models import peft_model

WINDOW = 12  # filled by prompts of 7 tokens and 5 more
WINDOWED = ("mistral", "gemma2", "gemma4")


def model_of(family):
    return tiny_model(family, **({"sliding_window": WINDOW} if family in WINDOWED else {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("gpt2", "llama", "qwen3_moe", *WINDOWED))
def test_tokens_are_those_of_plain_steps(graphs, family, kind):
    model = model_of(family)
    attachment, given = attach(model, kind)
    call = padded() | {"max_new_tokens": 12} | given(2) | OPTIONS
    with attachment:
        expected = model.generate(**call)
        got = model.generate(**call, **STATIC)
    assert torch.equal(got, expected)
    assert graphs.recorded == 1 + (3 if family in WINDOWED else 1), "a kind of step each, beside what keeps the memory"
    assert graphs.replays == (3 + 2 if family in WINDOWED else 10)


@pytest.mark.parametrize("family", [family for family in MODELS if not family.startswith("llama4")])
def test_every_family(graphs, family):
    """Windows of 8 have one place left after the prompt. BLOOM and MPT take a mask that grows, LongCat-Flash and XGLM wait
    for the device, others keep a state."""
    model = tiny_model(family)
    call = padded() | {"max_new_tokens": 8} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert (graphs.replays == 0) == (family in ("bloom", "longcat_flash", "mpt", "xglm", *WITH_STATE))


@pytest.mark.parametrize("length", (10, 11, 12, 15))
@pytest.mark.parametrize("window", ("pinned", "peft"))
@pytest.mark.parametrize("family", ("mistral", "gemma2"))
def test_prompts_around_a_window(graphs, family, window, length):
    model = model_of(family)
    call = {"input_ids": ids(2, length), "max_new_tokens": 8} | OPTIONS
    with attach_prefix(model, random_prefix(model), prefix_window=window):
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("mistral", "gemma2"))
def test_a_prefix_slides_out_of_the_window_as_in_plain_steps(graphs, family, kind):
    model = model_of(family)
    attachment, given = attach(model, kind, prefix_window="peft")
    call = padded() | {"max_new_tokens": 12} | given(2) | OPTIONS
    with attachment:
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays == 3 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_a_chat_with_one_static_cache(graphs, kind):
    model = tiny_model("llama")
    attachment, given = attach(model, kind)
    cache = StaticCache(config=model.config, max_cache_len=40)
    conversation = ids()[:, :0]
    with attachment:
        for seed in (1, 2, 3):
            conversation = torch.cat([conversation, ids(2, 5, seed)], 1)
            call = {"input_ids": conversation, "max_new_tokens": 6} | given(2) | OPTIONS
            expected = model.generate(**call)
            conversation = model.generate(**call, **{CACHE: cache})
            assert torch.equal(conversation, expected)
    assert graphs.replays == 3 * 4 + 2
    assert cache.get_seq_length() == 3 * 11 - 1


@pytest.mark.parametrize("chunk", (1, 2, 3))
def test_prompts_in_chunks(graphs, chunk):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        assert torch.equal(model.generate(**call, **STATIC, prefill_chunk_size=chunk), model.generate(**call))
    assert graphs.replays >= 4


@pytest.mark.parametrize("options", ({"prompt_lookup_num_tokens": 2}, {"assistant_early_exit": 1}), ids=str)
def test_assisted_decoding(graphs, options):
    """Steps of several tokens, some taken back, and some of one."""
    if CACHE == "past_key_values":
        pytest.skip("transformers before 5.24 refuses a static cache there")
    model = tiny_model("llama")
    phrase = ids(1, 4)
    call = {"input_ids": torch.cat([phrase, ids(1, 2, seed=2), phrase], 1), "max_new_tokens": 12} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC, **options), expected)


def test_sampling_draws_the_same(graphs):
    model = tiny_model("llama")
    call = padded() | OPTIONS | {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 2}
    with attach_prefix(model, random_prefix(model)):
        torch.manual_seed(5)
        expected = model.generate(**call)
        torch.manual_seed(5)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays == 8


def test_beams_run_their_plain_steps(graphs):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 6, "num_beams": 3} | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        assert torch.equal(model.generate(**call, **STATIC), model.generate(**call))
    assert graphs.recorded == 0


def test_what_a_step_gives_is_the_callers(graphs):
    """Logits and hidden states of all steps, and the cache, are what they were: later steps do not write over them."""
    model = tiny_model("llama")
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    call = padded() | {"max_new_tokens": 7} | wanted | OPTIONS
    with attach_prefix(model, random_prefix(model)):
        expected, got = model.generate(**call), model.generate(**call, **STATIC)
    assert graphs.replays == 5
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)
    assert isinstance(got[CACHE], StaticCache) and got[CACHE].get_seq_length() == 7 + 6


@pytest.mark.parametrize("run", (1, 2), ids=("beforehand", "while it is recorded"))
@pytest.mark.parametrize("family", ("llama", "gemma2", "mistral"))
@pytest.mark.parametrize("length", (5, 14), ids=("", "full"))
def test_steps_that_cannot_be_recorded_run_as_they_are(graphs, monkeypatch, length, family, run):
    """The device is left in the middle of the layers. The prompt is run 0."""
    model, runs = model_of(family), []
    call = padded(length=length) | {"max_new_tokens": 6} | OPTIONS
    layer = model.model.layers[1]
    forward = layer.forward

    def stops(*args, **kwargs):
        runs.append(None)
        if len(runs) == run + 1:
            raise RuntimeError("waits for the device")
        return forward(*args, **kwargs)

    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call)
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot be recorded.*waits for the device"):
            patch.setattr(layer, "forward", stops)
            assert torch.equal(model.generate(**call, **STATIC), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays == 0
    with attach_prefix(model, random_prefix(model)):
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert graphs.replays > 0


def test_a_step_that_needs_what_is_not_loaded_runs_before_it_is_recorded(graphs, monkeypatch):
    model = tiny_model("llama")
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    recordings = []

    class NotLoaded(graphs):
        def __init__(self, function, pool=None, large=True, loaded=False):
            recordings.append(loaded)
            super().__init__(function, pool, large, loaded)
            if loaded:
                raise cuda_graphs.CaptureError("something is not loaded")

    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call)
        model.generate(**call, **STATIC)
        before = graphs.replays
        monkeypatch.setattr(cuda_graphs, "Graph", NotLoaded)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert recordings == [True, False, False] and NotLoaded.replays == before + 4


def test_hooks_of_ones_own_see_every_step(graphs):
    model, seen = tiny_model("llama"), []
    call = padded() | {"max_new_tokens": 6} | OPTIONS | STATIC
    with attach_prefix(model, random_prefix(model)):
        model.generate(**call)
        hook = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        replays = graphs.replays
        model.generate(**call)
        hook.remove()
        assert seen == [7, 1, 1, 1, 1, 1] and graphs.replays == replays
        model.generate(**call)
    assert graphs.replays == 2 * replays + 1


def test_a_compile_config_of_ones_own_is_heeded(graphs):
    model = tiny_model("llama", num_hidden_layers=2)
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    call = padded() | {"max_new_tokens": 4} | OPTIONS | STATIC
    torch._dynamo.reset()
    with attach_prefix(model, random_prefix(model)):
        expected = model.generate(**call, disable_compile=True)
        assert not hasattr(model, "_compiled_call")
        assert torch.equal(model.generate(**call, compile_config=config), expected)
    assert hasattr(model, "_compiled_call")
    assert graphs.recorded == 0


def test_only_models_on_one_gpu_are_recorded():
    spread = {"model.layers.0": 0, "model.layers.1": 1}
    for model_type, device, places, quantizer, expected in (
        ("llama", "cuda", None, None, True),
        ("llama", "cuda", {"": 0}, SimpleNamespace(is_compileable=True), True),
        ("llama", "cuda", None, SimpleNamespace(is_compileable=False), False),
        ("llama", "cuda", spread, None, False),
        ("llama", "cpu", None, None, False),
        ("llama4_text", "cuda", None, None, False),
    ):
        config = SimpleNamespace(model_type=model_type)
        model = SimpleNamespace(device=torch.device(device), hf_device_map=places, hf_quantizer=quantizer, config=config)
        assert graphed_decoding.can_record(model) == expected
    model = tiny_model("llama")
    with attach_prefix(model, random_prefix(model)):
        assert model.get_compiled_call(None) is model._compiled_call, "transformers' own"
    assert not graphed_decoding.can_record(model)


@pytest.mark.parametrize("family", ("bart", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "t5gemma"))
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_decoders(graphs, family, kind):
    model = tiny_encoder_decoder(family)
    attachment, chosen = attach(model, kind)
    call = padded(length=6) | {"max_new_tokens": 9} | OPTIONS | chosen(2)
    with attachment:
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    older = ("bart", "marian", "mbart", "pegasus") if CACHE == "past_key_values" else ()  # transformers before 5.24
    counted = family in ("m2m_100", "t5gemma", *older)
    assert graphs.replays == (0 if counted else 7), "where Python counts the positions, nothing can be replayed"


@pytest.mark.parametrize("family", ("t5", "t5gemma"))
def test_padded_beginnings_of_encoder_decoders(graphs, family):
    """Their tokens tell the positions, and a recorded step would not see them."""
    model = tiny_encoder_decoder(family)
    config = model.get_decoder().config
    if getattr(config, "layer_types", None):  # a window would keep the steps from being recorded
        config.layer_types = ["full_attention"] * len(config.layer_types)
    for layer in model.get_decoder().modules():
        if hasattr(layer, "sliding_window"):
            layer.sliding_window = None
    begin, mask = torch.tensor([[0, 0, 1, 7], [1, 5, 9, 11]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    call = padded(length=6) | {"decoder_input_ids": begin, "decoder_attention_mask": mask, "max_new_tokens": 9} | OPTIONS
    with attach(model, "prefix")[0]:
        expected = model.generate(**call, **STATIC, disable_compile=True)
        assert torch.equal(model.generate(**call, **STATIC), expected)


def test_lora_beside_a_prefix_and_a_prefix_of_peft(graphs):
    peft = pytest.importorskip("peft")
    call = padded() | {"max_new_tokens": 6} | OPTIONS
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama"), config)
    with attach_prefix(model, random_prefix(model.get_base_model())):
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
        with model.disable_adapter():
            assert torch.equal(model.generate(**call, **STATIC), model.generate(**call))
    model = accelerate_peft(peft_model(tiny_model("llama"), 5))
    assert torch.equal(model.generate(**call, **STATIC), model.generate(**call))
    assert graphs.replays == 3 * 4 + 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ("gpt2", "llama", "qwen3_moe", *WINDOWED))
def test_on_a_gpu_tokens_are_those_of_plain_steps(counted, family, kind):
    model = model_of(family).cuda()
    attachment, given = attach(model, kind)
    with attachment:
        for batch, length, steps in ((2, 7, 12), (3, 5, 9), (2, 7, 12)):
            call = on_gpu(padded(batch, length)) | {"max_new_tokens": steps} | given(batch) | OPTIONS
            expected = model.generate(**call)
            assert torch.equal(model.generate(**call, **STATIC, disable_compile=True), expected)
            assert torch.equal(model.generate(**call, **STATIC), expected)
    assert counted["made"] == 1 + (5 if family in WINDOWED else 3)
    assert counted["replays"] >= (3 + 4 + 5 + 3 + 4 if family in WINDOWED else 10 + 7 + 10)
    assert not hasattr(model, "_compiled_call")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_on_a_gpu_a_float32_prefix_a_reparametrisation_and_what_a_step_gives(counted, dtype):
    model = tiny_model("llama").to("cuda", dtype)
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    call = on_gpu(padded()) | {"max_new_tokens": 8} | wanted | OPTIONS | STATIC
    for prefix in (random_prefix(model), random_prefix(model, reparametrization="mlp")):
        with attach_prefix(model, prefix):
            expected, got = model.generate(**call, disable_compile=True), model.generate(**call)
            assert torch.equal(got.sequences, expected.sequences)
            tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
            torch.testing.assert_close(got.logits, expected.logits, **tolerance)
            torch.testing.assert_close(got.hidden_states, expected.hidden_states, **tolerance)
    assert counted["replays"] >= 2 * 6


@pytest.mark.gpu
def test_on_a_gpu_a_static_cache_goes_on_for_several_turns(counted):
    model = tiny_model("llama").cuda()
    cache = StaticCache(config=model.config, max_cache_len=40)
    conversation = ids()[:, :0].cuda()
    with attach_prefix(model, random_prefix(model)):
        for seed in (1, 2, 3):
            conversation = torch.cat([conversation, ids(2, 5, seed).cuda()], 1)
            call = {"input_ids": conversation, "max_new_tokens": 6} | OPTIONS
            expected = model.generate(**call)
            conversation = model.generate(**call, **{CACHE: cache})
            assert torch.equal(conversation, expected)
    assert counted["replays"] >= 3 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("family", ("bart", "t5"))
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_encoder_decoders(counted, family, kind):
    if family == "bart" and CACHE == "past_key_values":
        pytest.skip("before transformers 5.24 its positions are a number that Python reads")
    model = tiny_encoder_decoder(family).cuda()
    attachment, chosen = attach(model, kind)
    call = on_gpu(padded(length=6)) | {"max_new_tokens": 9} | OPTIONS | chosen(2)
    with attachment:
        expected = model.generate(**call)
        assert torch.equal(model.generate(**call, **STATIC), expected)
    assert counted["replays"] >= 7
