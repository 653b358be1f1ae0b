"""Prefixes in a real vLLM on the CPU: the tokens that transformers gives with the same prefix attached; its HTTP server."""

import contextlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from prefix_tuning import attach_prefix
from support import vllm_stub
from support.generation import other_prefix
from support.models import random_prefix, tiny_model
from support.tokenizer import CHAT_TEMPLATE, tiny_tokenizer

vllm = pytest.importorskip("vllm", reason="needs vllm 0.32, in an environment of its own")

from vllm.distributed.kv_transfer.kv_connector.v1 import base  # noqa: E402
from vllm.v1.engine.async_llm import AsyncLLM  # noqa: E402

from prefix_tuning.served_prefixes import ServedPrefixes  # noqa: E402
from prefix_tuning.vllm_connector import PrefixConnector  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BLOCK, NEW = 32, 16
LENGTHS = {"short": 5, "middle": 40, "blocks": 64}  # less than a block, more than one, two of them
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
ENGINE = {"dtype": "float32", "enforce_eager": True, "block_size": BLOCK, "max_num_seqs": 8, "generation_config": "vllm"}


class Served:
    """A tiny model and its prefixes, saved, and what transformers makes of them."""

    def __init__(self, folder, family="llama", **changes):
        self.model = tiny_model(family, **({"head_dim": 32, "max_position_embeddings": 256} | changes))
        self.path, self.folder = folder / "model", folder
        self.model.save_pretrained(self.path)
        tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE).save_pretrained(self.path)
        self.prefixes = {
            name: (other_prefix if name == "middle" else random_prefix)(self.model, length) for name, length in LENGTHS.items()
        }
        for name, prefix in self.prefixes.items():
            prefix.save(folder / name)

    def load(self, **options):
        return ServedPrefixes.load({name: self.folder / name for name in LENGTHS}, model=self.path, **options)

    def attached(self, name):
        return contextlib.nullcontext() if name is None else attach_prefix(self.model, self.prefixes[name])

    def tokens(self, name, ids):
        with self.attached(name):
            tokens = self.model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
            )
        return tokens[0, len(ids) :].tolist()

    def logprobs(self, name, ids):
        """Of each token but the first, behind those before it."""
        with self.attached(name), torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return logprobs[range(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return Served(tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def engine(served, prefixes, **options):
    llm = vllm.LLM(str(served.path), kv_transfer_config=prefixes.kv_transfer_config(), **ENGINE | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def prefixes(served):
    return served.load(prompt_logprobs=True, placeholder_id=3)


@pytest.fixture(scope="module")
def llm(served, prefixes):
    """Prompts longer than 48 tokens run in chunks."""
    with engine(served, prefixes, max_model_len=256, max_num_batched_tokens=48) as llm:
        yield llm


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is not parameter.VAR_KEYWORD]


@pytest.mark.parametrize("made", ["PrefixConnector", "KVConnectorBase_V1", "AsyncLLM"])
def test_connector_and_stub_have_the_methods_of_the_real_ones(made):
    """What other tests run over is what vLLM calls."""
    ours = PrefixConnector if made == "PrefixConnector" else getattr(vllm_stub, made)
    real = AsyncLLM if made == "AsyncLLM" else base.KVConnectorBase_V1
    shared = [name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(real, name)]
    assert "__init__" in shared and len(shared) > 2
    for name in set(shared) - {"__init__"}:
        own, theirs = parameters(getattr(ours, name)), parameters(getattr(real, name))
        assert own == (theirs if made != "AsyncLLM" else [name for name in theirs if name in own]), name


def test_the_stub_reports_as_the_real_one():
    assert parameters(vllm_stub.KVConnectorTransferResults) == parameters(base.KVConnectorTransferResults)


def ids(length, seed=0):
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(llm, prefixes, requests, cache_salt=None, **options):
    """Runs (name, ids) together; the outputs."""
    prompts = [
        {"prompt_token_ids": tokens} if name is None else prefixes.prompt(name, tokens, cache_salt) for name, tokens in requests
    ]
    options = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, **options}
    return llm.generate(prompts, vllm.SamplingParams(**options), use_tqdm=False)


def generated(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs]


def requests(lengths):
    return [(name, ids(length, seed)) for seed, length in enumerate(lengths) for name in (*LENGTHS, None)]


def test_tokens_of_a_mixed_batch_are_those_of_transformers(llm, prefixes, served):
    asked = requests((3, 7, 60))
    expected = [served.tokens(*request) for request in asked]
    assert len({tuple(tokens) for tokens in expected}) == len(asked)
    assert generated(run(llm, prefixes, asked)) == expected
    again = run(llm, prefixes, asked)  # what was cached for the first is read
    assert generated(again) == expected
    for (name, tokens), output in zip(asked, again, strict=True):
        prefix_len = LENGTHS.get(name, 0)
        cached = max(prefix_len, (prefix_len + len(tokens) - 1) // BLOCK * BLOCK)
        assert output.num_cached_tokens == cached


def test_a_salt_of_the_callers_keeps_caches_apart(llm, prefixes, served):
    request = ("middle", ids(60, seed=7))
    cached = [run(llm, prefixes, [request], salt)[0].num_cached_tokens for salt in ("one", "one", "other", None)]
    assert cached == [40, 96, 40, 40]


@pytest.mark.parametrize("name", LENGTHS)
def test_prompt_logprobs(name, llm, prefixes, served):
    """They come first, computed over placeholders, and what they leave in the cache serves others."""
    tokens = ids(50, seed=11)
    (output,) = run(llm, prefixes, [(name, tokens)], "scored", prompt_logprobs=0)
    found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[LENGTHS[name] + 1 :], tokens[1:], strict=True)]
    torch.testing.assert_close(torch.tensor(found), served.logprobs(name, tokens), atol=1e-4, rtol=1e-4)
    assert generated([output]) == [served.tokens(name, tokens)]
    (after,) = run(llm, prefixes, [(name, tokens)], "scored")
    assert after.num_cached_tokens > LENGTHS[name] and generated([after]) == [served.tokens(name, tokens)]


WRONG = {
    "no placeholders": lambda prompt: prompt | {"prompt_token_ids": prompt["prompt_token_ids"][5:]},
    "one too few": lambda prompt: prompt | {"prompt_token_ids": prompt["prompt_token_ids"][1:]},
    "a single token": lambda prompt: prompt | {"prompt_token_ids": [7]},
    "nothing behind them": lambda prompt: prompt | {"prompt_token_ids": prompt["prompt_token_ids"][:5]},
    "an unknown name": lambda prompt: prompt | {"cache_salt": prompt["cache_salt"].replace("short", "long")},
    "no name": lambda prompt: prompt | {"cache_salt": "prefix-tuning:"},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("options", [{}, {"prompt_logprobs": 0}], ids=["plain", "prompt_logprobs"])
def test_wrong_requests_end_with_an_error_and_others_go_on(wrong, options, llm, prefixes, served):
    tokens = ids(9, seed=5)
    prompts = [WRONG[wrong](prefixes.prompt("short", tokens)), prefixes.prompt("short", tokens), {"prompt_token_ids": tokens}]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, **options)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length", "length"]
    assert generated(outputs) == [[], served.tokens("short", tokens), served.tokens(None, tokens)]


def test_preemption_without_prefix_caching(served):
    """Seven blocks for eight requests: some lose theirs while they run, and get the prefix anew."""
    prefixes = served.load()
    options = {"enable_prefix_caching": False, "num_gpu_blocks_override": 14, "max_model_len": 128, "disable_log_stats": False}
    with engine(served, prefixes, **options) as llm:
        asked = [("middle", ids(14, seed)) for seed in range(6)] + [(None, ids(30, 9)), ("short", ids(25, 8))]
        assert generated(run(llm, prefixes, asked)) == [served.tokens(*request) for request in asked]
        metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"] > 0
        refused = run(llm, prefixes, asked[:1], prompt_logprobs=0)[0].outputs[0]
        assert refused.finish_reason == "error"


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_families(family, tmp_path):
    """Learned positions; normalised keys."""
    changes = {"n_embd": 128, "n_positions": 256} if family == "gpt2" else {}
    served = Served(tmp_path, family, **changes)
    prefixes, asked = served.load(), requests((6,))
    with engine(served, prefixes, max_model_len=256) as llm:
        assert generated(run(llm, prefixes, asked)) == [served.tokens(*request) for request in asked]


def test_two_ranks_share_the_heads(served, monkeypatch):
    first, *others = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{(others or [first])[0]}")
    prefixes, asked = served.load(), requests((6,))
    with engine(served, prefixes, max_model_len=256, tensor_parallel_size=2) as llm:
        assert generated(run(llm, prefixes, asked)) == [served.tokens(*request) for request in asked]


def test_windows_are_refused(tmp_path, capfd):
    served = Served(tmp_path, "mistral", sliding_window=32)
    with pytest.raises(NotImplementedError, match="expected full attention, got a window of 32"):
        served.load()
    unchecked = ServedPrefixes.load({name: served.folder / name for name in LENGTHS})
    with pytest.raises(RuntimeError), engine(served, unchecked, max_model_len=256):
        pass
    assert "model: expected a cache with one group" in capfd.readouterr().err.replace("\n", " ")


def test_the_example_of_the_documents(served, tmp_path, monkeypatch):
    example = textwrap.dedent(DOCUMENT.read_text().split("From Python, without a server:\n")[1].split("\nThe outputs")[0])
    for written, run in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(served.path),
        "temperature=0": f"temperature=0, max_tokens={NEW}, ignore_eos=True",
        "LLM(name,": f"LLM(name, **{ENGINE}, max_model_len=128,",
    }.items():
        assert written in example
        example = example.replace(written, run)
    for name, ours in {"pubs": "short", "food": "middle"}.items():
        served.prefixes[ours].save(tmp_path / "runs" / name / "prefix")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "serving.md", "exec"), names := {"__name__": "__main__"})
    names["llm"].llm_engine.engine_core.shutdown()
    assert generated(names["outputs"]) == [served.tokens(name, names["ids"]) for name in ("short", "middle", None)]


@pytest.fixture(scope="module")
def server(served):
    """The address of `prefix-tuning serve`, which ends with status 0 when it is asked to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--model", served.path, "--host", "127.0.0.1", "--port", port, "--prompt-logprobs"]
    options += [part for name in LENGTHS for part in ("--prefix", f"{name}={served.folder / name}")]
    vllms = ["--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--max-model-len", "160"]
    vllms += ["--block-size", BLOCK, "--max-num-seqs", "8", "--generation-config", "vllm", "--enable-prompt-tokens-details"]
    command = [sys.executable, "-m", "prefix_tuning.cli", "serve", *options, "--", *vllms]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([*map(str, command)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, "the server has ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            time.sleep(0.5)
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()


def ask(server, path, **body):
    """(status, answer); of a streamed answer the list of its parts."""
    body = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True, **body}
    request = urllib.request.Request(f"{server}/v1/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]
    if not body.get("stream"):
        return status, json.loads(text)
    parts = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert parts.pop() == "[DONE]"
    return status, [json.loads(part) for part in parts]


def test_models_are_listed(server):
    with urllib.request.urlopen(f"{server}/v1/models") as answer:
        listed = {model["id"]: model["parent"] for model in json.load(answer)["data"]}
    assert listed == {"base": None, **dict.fromkeys(LENGTHS, "base")}


@pytest.mark.parametrize("stream", [False, True])
def test_completions(stream, server, served):
    prompts = [ids(6, 1), ids(20, 2)]
    for name in (*LENGTHS, "base"):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        status, answer = ask(server, "completions", model=name, prompt=prompts, stream=stream, **options)
        assert status == 200
        parts = answer if stream else [answer]
        assert {part["model"] for part in parts} == {name}
        assert (parts[-1]["usage"]["prompt_tokens"], parts[-1]["usage"]["completion_tokens"]) == (26, 2 * NEW)
        got = [[], []]
        for choice in (choice for part in parts for choice in part["choices"]):
            got[choice["index"]] += choice["token_ids"]
        assert got == [served.tokens(None if name == "base" else name, prompt) for prompt in prompts]


def test_text_is_tokenised_behind_the_prefix(server, served):
    """With the token that begins texts, as in training."""
    status, answer = ask(server, "completions", model="middle", prompt="the end")
    tokens = tiny_tokenizer(bos=True)("the end")["input_ids"]
    assert status == 200 and answer["choices"][0]["prompt_token_ids"] == tokens and tokens[0] == 1
    assert answer["choices"][0]["token_ids"] == served.tokens("middle", tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_chat(stream, server, served):
    messages = [{"role": "user", "content": "Where is Aromi?"}]
    tokenizer = tiny_tokenizer(bos=True, chat_template=CHAT_TEMPLATE)
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    for name in (*LENGTHS, "base"):
        status, answer = ask(server, "chat/completions", model=name, messages=messages, stream=stream)
        assert status == 200
        parts = answer if stream else [answer]
        assert {part["model"] for part in parts} == {name}
        got = [token for part in parts for choice in part["choices"] for token in choice.get("token_ids") or ()]
        assert got == served.tokens(None if name == "base" else name, tokens)


def test_echo_with_logprobs(server, served):
    tokens = ids(30, seed=3)
    status, answer = ask(server, "completions", model="middle", prompt=tokens, echo=True, logprobs=0, max_tokens=1)
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert status == 200 and found[0] is None and len(found) == 31 and answer["usage"]["prompt_tokens"] == 30
    torch.testing.assert_close(torch.tensor(found[1:30]), served.logprobs("middle", tokens), atol=1e-4, rtol=1e-4)


def test_beams_and_several_choices(server, served):
    with served.attached("short"):
        expected = served.model.generate(
            torch.tensor([ids(6)]), num_beams=3, do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0
        )[0, 6:].tolist()
    options = {"prompt": ids(6), "model": "short", "max_tokens": 6}
    status, answer = ask(server, "completions", use_beam_search=True, n=3, return_token_ids=False, **options)
    assert status == 200 and answer["choices"][0]["text"] == tiny_tokenizer().decode(expected)
    status, answer = ask(server, "completions", n=3, temperature=1, seed=1, **options)
    assert status == 200 and len(answer["choices"]) == 3 and answer["usage"]["prompt_tokens"] == 6


def test_cached_tokens_are_those_of_the_prompt(server):
    body = {"model": "middle", "prompt": ids(70, seed=4), "max_tokens": 1}
    cached = [
        ask(server, "completions", **body, **salt)[1]["usage"]["prompt_tokens_details"]
        for salt in ({}, {}, {"cache_salt": "tenant"}, {"cache_salt": "tenant"})
    ]
    cached = [(details or {"cached_tokens": 0})["cached_tokens"] for details in cached]
    assert cached == [0, 96 - 40, 0, 96 - 40]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "nobody"}, 404, "`nobody` does not exist"),
        ({"model": "blocks", "prompt": ids(100)}, 400, "got 100 behind the 64 positions of the prefix blocks"),
        ({"model": "base", "cache_salt": 'prefix-tuning:["short", null]'}, 400, "that of a prefix, which is chosen by model"),
        ({"model": "short", "cache_salt": ""}, 400, "cache_salt"),
    ],
)
def test_refused_over_http(body, status, message, stream, server):
    found, text = ask(server, "completions", **{"prompt": ids(4), "stream": stream} | body)
    assert found == status and message in text


def test_many_at_once(server, served):
    """More than run together, of every prefix; each gets what it gets alone."""
    asked = requests((4, 11, 18, 25))
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, server, "completions", model=name or "base", prompt=tokens) for name, tokens in asked]
        got = [answer.result()[1]["choices"][0]["token_ids"] for answer in answers]
    assert got == [served.tokens(*request) for request in asked]
