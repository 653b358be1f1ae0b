"""A saved prefix comes back as it was, a save that fails leaves a whole one, damaged files are named; the hub."""

import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from prefix_tuning import Prefix, prefix_files
from prefix_tuning.prefix_files import CONFIG_FILE, MLP_FILE, TENSORS_FILE
from prefix_tuning.reparametrization import MLPReparametrization
from support.models import random_prefix, tiny_model
from support.prefixes import assert_layers, mlp_prefix, pairs


def text_prefix(dtype=torch.bfloat16):
    return Prefix.from_text(tiny_model("llama").to(dtype), None, input_ids=[5, 6, 7])


KINDS = {
    "random": lambda: random_prefix(tiny_model("gpt2")),
    "text": text_prefix,
    "half": lambda: Prefix({"decoder": pairs(dtype=torch.float16)}, position_offset=0, base_model="someone/tiny"),
    "parts": lambda: Prefix({"encoder": pairs(1, 3), "cross": pairs(value_dim=5), "decoder": pairs()}, position_offset=9),
    "mlp": mlp_prefix,
}


@pytest.mark.parametrize("kind", KINDS)
def test_saved_prefix_comes_back_as_it_was(kind, tmp_path):
    prefix, directory = KINDS[kind](), tmp_path / "new" / "folder"
    prefix.save(directory)
    loaded = Prefix.load(directory)
    assert {file.name for file in directory.iterdir()} == {CONFIG_FILE, TENSORS_FILE}
    assert loaded.parts == prefix.parts and loaded.reparametrization is None
    for part in prefix.parts:
        assert_layers(loaded.layers(part), prefix.layers(part))
    names = ("prefix_len", "position_offset", "base_model")
    assert [getattr(loaded, name) for name in names] == [getattr(prefix, name) for name in names]
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    for converted in (Prefix.load(str(directory), dtype=torch.float64), Prefix.load(directory, device="meta")):
        tensor = converted.layers(next(iter(prefix.parts)))[0][0]
        assert tensor.dtype == torch.float64 or tensor.device.type == "meta"


def test_saved_files_are_documented_readable_by_others_and_stable(tmp_path):
    umask = os.umask(0o022)
    try:
        Prefix({"decoder": pairs(value_dim=6)}, position_offset=0, base_model="tiny").save(tmp_path)
        mlp_prefix().save(tmp_path / "mlp", keep_reparametrization=True)
    finally:
        os.umask(umask)
    config = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    assert config.pop("library_version")
    assert config == {
        "format": "prefix-tuning", "format_version": 1, "base_model": "tiny", "prefix_len": 3, "position_offset": 0,
        "parts": {"decoder": {"layers": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 6}},
    }  # fmt: skip
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_FILE)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        f"decoder.{layer}.{name}": (2, 3, dim) for layer in (0, 1) for name, dim in (("key", 4), ("value", 6))
    }
    files = [*tmp_path.glob("*.*"), *(tmp_path / "mlp").glob("*.*")]
    assert len(files) == 5 and {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o644}


def test_kept_mlp_goes_on_and_a_later_save_without_removes_it(tmp_path):
    prefix = mlp_prefix()
    prefix.save(tmp_path, keep_reparametrization=True)
    loaded = Prefix.load(tmp_path)
    for name, tensor in prefix.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert_layers(loaded.layers(), prefix.layers())
    assert isinstance(loaded.reparametrization["decoder"], MLPReparametrization)
    sum(tensor.square().sum() for pair in loaded.layers() for tensor in pair).backward()
    assert all(p.grad.abs().max() > 0 for p in loaded.parameters())
    assert {p.dtype for p in Prefix.load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    other = random_prefix(tiny_model("llama"))
    other.save(tmp_path, keep_reparametrization=True)
    assert not (tmp_path / MLP_FILE).exists()
    assert_layers(Prefix.load(tmp_path).layers(), other.layers())


def test_mlp_beside_a_part_without_one(tmp_path):
    mlp = mlp_prefix().reparametrization["decoder"]
    prefix = Prefix({"decoder": mlp, "cross": pairs(prefix_len=5)})
    prefix.save(tmp_path, keep_reparametrization=True)
    loaded = Prefix.load(tmp_path)
    assert set(loaded.reparametrization) == {"decoder"}
    for part in ("decoder", "cross"):
        assert_layers(loaded.layers(part), prefix.layers(part))


FAILURES = [  # the call that fails, and whose keys and values are loaded afterwards
    ("save_file", 1, "old"),
    ("save_file", 2, "old"),
    ("write_text", 1, "old"),
    ("replace", 1, "old"),
    ("replace", 2, "new"),
    ("replace", 3, "new"),
]


@pytest.mark.parametrize("name, call, whose", FAILURES)
def test_a_save_that_fails_leaves_a_whole_prefix(name, call, whose, tmp_path, monkeypatch):
    """The MLP is replaced first: it decides what is loaded, and whatever stands beside it has the same shape."""
    old, new = mlp_prefix(seed=1), mlp_prefix(seed=2)
    old.save(tmp_path, keep_reparametrization=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    owner, calls = {"save_file": prefix_files, "write_text": Path, "replace": os}[name], []
    original = getattr(owner, name)

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise OSError("no space left")
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(OSError, match="no space left"):
            new.save(tmp_path, keep_reparametrization=True)
    assert len(calls) == call
    assert {file.name for file in tmp_path.iterdir()} == set(before)
    if whose == "old":
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert_layers(Prefix.load(tmp_path).layers(), {"old": old, "new": new}[whose].layers())


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(prefix_files, "save_file", failing)
    for save in (random_prefix(tiny_model("llama")).save, random_prefix(tiny_model("llama")).to_peft):
        with pytest.raises(OSError, match="safetensors: .*No space left on device"):
            save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stale_mlp_goes_before_anything_is_replaced(tmp_path, monkeypatch):
    """Else a save that dies in between would leave new keys and values that the old MLP overrules."""
    old = mlp_prefix(seed=1)
    old.save(tmp_path, keep_reparametrization=True)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            random_prefix(tiny_model("llama")).save(tmp_path)
    assert not (tmp_path / MLP_FILE).exists()
    assert_layers(Prefix.load(tmp_path).layers(), old.layers())


def edited(**changes):
    """Writes the json with these keys changed; a value of `...` takes its key away."""

    def damage(directory):
        config = json.loads((directory / CONFIG_FILE).read_text())
        config = {name: value for name, value in {**config, **changes}.items() if value is not ...}
        (directory / CONFIG_FILE).write_text(json.dumps(config))

    return damage


def written(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def truncated(name, share=0.5):
    def damage(directory):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(len(content) * share)])

    return damage


def tensors(name, change):
    def damage(directory):
        found = safetensors.torch.load_file(directory / name)
        change(found)
        safetensors.torch.save_file(found, directory / name)

    return damage


def without(name):
    return lambda directory: (directory / name).unlink()


SHAPE = {"layers": 3, "kv_heads": 2, "head_dim": 16, "value_dim": 16}
KEY = "decoder.0.key"
DAMAGES = {
    "no json": (CONFIG_FILE, without(CONFIG_FILE), FileNotFoundError, "expected the description .*, got no such file"),
    "no tensors": (TENSORS_FILE, without(TENSORS_FILE), FileNotFoundError, "expected the tensors .*, got no such file"),
    "empty json": (CONFIG_FILE, written(CONFIG_FILE, b""), ValueError, "expected JSON"),
    "cut json": (CONFIG_FILE, truncated(CONFIG_FILE), ValueError, "expected JSON"),
    "binary json": (CONFIG_FILE, written(CONFIG_FILE, b"\xff\xfe\x00"), ValueError, "expected JSON"),
    "json list": (CONFIG_FILE, written(CONFIG_FILE, b"[]"), ValueError, "expected .*, got list"),
    "peft json": (CONFIG_FILE, written(CONFIG_FILE, b'{"peft_type": "PREFIX_TUNING"}'), ValueError, "got .None, None."),
    "format": (CONFIG_FILE, edited(format="other"), ValueError, "expected .'prefix-tuning', 1..*, got .'other', 1."),
    "version": (CONFIG_FILE, edited(format_version=2), ValueError, "expected .*, got .'prefix-tuning', 2."),
    "no prefix_len": (CONFIG_FILE, edited(prefix_len=...), ValueError, "expected the key 'prefix_len', got only format, "),
    "no parts": (CONFIG_FILE, edited(parts=...), ValueError, "expected the key 'parts'"),
    "prefix_len 0": (CONFIG_FILE, edited(prefix_len=0), ValueError, "prefix_len: expected at least 1, got 0"),
    "prefix_len text": (CONFIG_FILE, edited(prefix_len="5"), ValueError, "prefix_len: expected an int, got '5'"),
    "offset": (CONFIG_FILE, edited(position_offset=-1), ValueError, "position_offset: expected at least 0, got -1"),
    "offset null": (CONFIG_FILE, edited(position_offset=None), ValueError, "position_offset: expected an int, got None"),
    "base_model": (CONFIG_FILE, edited(base_model=None), ValueError, "base_model: expected a string, got None"),
    "parts list": (CONFIG_FILE, edited(parts=["decoder"]), ValueError, "parts: expected one or more of decoder.*got"),
    "parts empty": (CONFIG_FILE, edited(parts={}), ValueError, "parts: expected one or more.*, got {}"),
    "parts name": (CONFIG_FILE, edited(parts={"head": SHAPE}), ValueError, "expected one or more of decoder"),
    "shape list": (CONFIG_FILE, edited(parts={"decoder": [3, 2]}), ValueError, "decoder: expected layers.*, got .3, 2."),
    "shape short": (CONFIG_FILE, edited(parts={"decoder": {"layers": 3}}), ValueError, "decoder: expected layers.*, got"),
    "shape 0": (CONFIG_FILE, edited(parts={"decoder": {**SHAPE, "kv_heads": 0}}), ValueError, "kv_heads: expected at least 1"),
    "deep json": (CONFIG_FILE, written(CONFIG_FILE, b"[" * 100_000), ValueError, "expected JSON .*recursion"),
    "empty file": (TENSORS_FILE, written(TENSORS_FILE, b""), ValueError, "damaged, or not a safetensors file"),
    "cut header": (TENSORS_FILE, truncated(TENSORS_FILE, 0.01), ValueError, "damaged, or not a safetensors file"),
    "cut data": (TENSORS_FILE, truncated(TENSORS_FILE, 0.9), ValueError, "damaged, or not a safetensors file"),
    "pickle": (TENSORS_FILE, written(TENSORS_FILE, pickle.dumps([0] * 99)), ValueError, "damaged, or not a safetensors file"),
    "length": (TENSORS_FILE, edited(prefix_len=6), ValueError, r"\[2, 6, 16\] .*, got \[2, 5, 16\] \(6 such differences"),
    "more layers": (
        TENSORS_FILE, edited(parts={"decoder": {**SHAPE, "layers": 4}}), ValueError,
        r"decoder.3.key: expected \[2, 5, 16\] by prefix_config.json, got none \(2 such differences",
    ),
    "any number of layers": (
        TENSORS_FILE, edited(parts={"decoder": {**SHAPE, "layers": 10**12}}), ValueError, "decoder.3.key: .*, got none"
    ),
    "fewer layers": (
        TENSORS_FILE, edited(parts={"decoder": {**SHAPE, "layers": 2}}), ValueError,
        "decoder.2.key: expected no such tensor",
    ),
    "a tensor gone": (TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.pop(KEY)), ValueError, "decoder.0.key: .*, got none"),
    "a foreign tensor": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update(a=torch.ones(1))), ValueError, "a: expected no such tensor",
    ),
    "dtypes": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update({KEY: t[KEY].half()})), ValueError,
        "expected one floating dtype, got torch.float16, torch.float32",
    ),
    "ints": (
        TENSORS_FILE, tensors(TENSORS_FILE, lambda t: t.update({n: v.int() for n, v in t.items()})), ValueError,
        "expected one floating dtype, got torch.int32",
    ),
    "mlp cut": (MLP_FILE, truncated(MLP_FILE), ValueError, "damaged, or not a safetensors file"),
    "mlp empty": (MLP_FILE, tensors(MLP_FILE, dict.clear), ValueError, "expected one floating dtype, got no tensor"),
    "mlp half": (
        MLP_FILE, tensors(MLP_FILE, lambda t: t.pop("decoder.output.bias")), ValueError, "decoder.output.bias: .*, got none",
    ),
    "mlp of another length": (
        MLP_FILE, tensors(MLP_FILE, lambda t: t.update({"decoder.embedding.weight": torch.ones(4, 64)})), ValueError,
        r"decoder.embedding.weight: expected \[5, 64\] .*, got \[4, 64\]",
    ),
    "mlp of no part": (
        MLP_FILE, tensors(MLP_FILE, lambda t: [t.update({n.replace("de", "en"): t.pop(n)}) for n in list(t)]), ValueError,
        "expected no such tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_with_what_was_expected(damage, tmp_path):
    file, apply, error, match = DAMAGES[damage]
    mlp_prefix().save(tmp_path, keep_reparametrization=True)
    Prefix.load(tmp_path)
    apply(tmp_path)
    with pytest.raises(error, match=match) as caught:
        Prefix.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / file}: ")


def test_load_refuses_wrong_dtypes_and_places_that_are_none(tmp_path):
    with pytest.raises(TypeError, match="dtype: expected .*, got torch.int64"):
        Prefix.load(tmp_path, dtype=torch.int64)
    for place in (tmp_path / "missing", "someone/never-cached-prefix", "no//place"):
        with pytest.raises(FileNotFoundError, match=f"{place}: expected a folder or a hub repository in reach, got neither"):
            Prefix.load(place)


# The hub, without a network


def test_push_to_hub_uploads_what_save_writes(monkeypatch):
    prefix, calls = mlp_prefix(), []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, **options):
            loaded = Prefix.load(folder_path)
            assert_layers(loaded.layers(), prefix.layers())
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), options, folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    prefix.push_to_hub("someone/prefix", private=True, token="secret", commit_message="first")
    *_, (*upload, folder) = calls
    assert calls[:2] == [("token", "secret"), ("create", "someone/prefix", {"private": True, "exist_ok": True})]
    assert upload == ["upload", "someone/prefix", sorted([TENSORS_FILE, CONFIG_FILE]), {"commit_message": "first"}]
    assert not Path(folder).exists()


def test_load_from_the_hub_downloads_the_prefix_alone(tmp_path, monkeypatch):
    prefix, asked = mlp_prefix(), []
    prefix.save(tmp_path, keep_reparametrization=True)

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = Prefix.load("someone/prefix", dtype=torch.float64)
    Prefix.load("someone/prefix", revision="v2")
    assert asked == [("someone/prefix", revision, {CONFIG_FILE, TENSORS_FILE, MLP_FILE}) for revision in (None, "v2")]
    assert loaded.reparametrization is not None
    assert_layers(loaded.layers(), [[t.double() for t in pair] for pair in prefix.layers()], atol=1e-6, rtol=1e-6)
