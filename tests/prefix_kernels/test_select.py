"""Which backend serves a call: asked for by name or variable, preferred by measured speed, and how that is explained."""

import pytest
import torch

import prefix_kernels
from prefix_kernels import select
from support.cases import Case
from support.inputs import make_inputs

PACKED = Case("varlen", seqlens_q=(5, 3))
SOFTCAP = [Case("softcap", softcap=2.0), Case("varlen, softcap", seqlens_q=(5, 3), softcap=2.0)]


@pytest.mark.parametrize("case", SOFTCAP, ids=str)
def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch, backend_calls, case):
    inputs = make_inputs(case)
    message = "backend 'sdpa' cannot serve this call: torch's kernels know no softcap"
    with pytest.raises(NotImplementedError, match=message):
        inputs.call(backend="sdpa")
    monkeypatch.setenv("PREFIX_KERNELS_BACKEND", "sdpa")
    with pytest.raises(NotImplementedError, match=message):
        inputs.call()
    assert not backend_calls
    inputs.call(backend="reference")
    monkeypatch.delenv("PREFIX_KERNELS_BACKEND")
    inputs.call()
    assert [call[0] for call in backend_calls] == ["reference", "reference"]


@pytest.mark.parametrize("case", [Case("plain"), PACKED], ids=str)
def test_the_variable_acts_where_the_call_names_no_backend(monkeypatch, backend_calls, case):
    inputs = make_inputs(case)
    for value, asked, chosen in (
        (None, None, "sdpa"), ("", None, "sdpa"), ("reference", None, "reference"), ("reference", "sdpa", "sdpa"),
        ("sdpa", "reference", "reference"), (None, "reference", "reference"),
    ):  # fmt: skip
        if value is None:
            monkeypatch.delenv("PREFIX_KERNELS_BACKEND", raising=False)
        else:
            monkeypatch.setenv("PREFIX_KERNELS_BACKEND", value)
        explanation = prefix_kernels.explain_backends(*inputs.tensors, **inputs.options, backend=asked)
        assert not backend_calls
        inputs.call(backend=asked).sum().backward()
        assert [call[:2] for call in backend_calls] == [(chosen, "forward"), (chosen, "backward")]
        assert [name for name, line in explanation.items() if line == "chosen"] == [chosen]
        backend_calls.clear()


def test_unknown_backends(monkeypatch, backend_calls):
    inputs = make_inputs(Case("plain"))
    for ask in (inputs.call, lambda **more: prefix_kernels.explain_backends(*inputs.tensors, **inputs.options, **more)):
        for name in ("flashy", ""):
            with pytest.raises(ValueError, match=f"^backend: expected one of sdpa, reference, got '{name}'"):
                ask(backend=name)
        with monkeypatch.context() as context:
            context.setenv("PREFIX_KERNELS_BACKEND", "flashy")
            with pytest.raises(ValueError, match="^PREFIX_KERNELS_BACKEND: expected one of sdpa, reference, got 'flashy'"):
                ask()
            ask(backend="reference")
    with pytest.raises(ValueError, match="^backend: expected one of sdpa, reference, got 'flashy'"):
        prefix_kernels.prefix_attention(*(tensor.to("meta") for tensor in inputs.tensors), backend="flashy")
    assert [call[0] for call in backend_calls] == ["reference"]


PREFERRED = f"not chosen: sdpa is preferred ({select.REASONS['sdpa']})"


@pytest.mark.parametrize(
    ("case", "more", "expected"),
    [
        (Case("plain"), {}, {"sdpa": "chosen", "reference": PREFERRED}),
        (Case("plain"), {"backend": "reference"}, {"sdpa": "not chosen: reference was asked for", "reference": "chosen"}),
        (PACKED, {"return_lse": True}, {"sdpa": "chosen", "reference": PREFERRED}),
        *((case, {}, {"sdpa": "refused: torch's kernels know no softcap", "reference": "chosen"}) for case in SOFTCAP),
        (
            SOFTCAP[0],
            {"backend": "sdpa"},
            {"sdpa": "refused: torch's kernels know no softcap", "reference": "not chosen: sdpa was asked for"},
        ),
    ],
    ids=str,
)
def test_explain_backends(operator_calls, backend_calls, case, more, expected):
    inputs = make_inputs(case)
    assert prefix_kernels.explain_backends(*inputs.tensors, **inputs.options, **more) == expected
    assert not backend_calls and not any(operator_calls.values())


def test_explain_backends_says_which_machine_code_a_backend_has(monkeypatch, backend_calls):
    inputs = make_inputs(Case("plain"))
    monkeypatch.setattr(select.load_backend("reference"), "machine_code", lambda: "sm_80", raising=False)
    said = prefix_kernels.explain_backends(*inputs.tensors, **inputs.options)
    assert said == {"sdpa": "chosen", "reference": f"{PREFERRED}; it would run sm_80"}


def test_explain_backends_rejects_wrong_calls_as_the_call_does():
    q, k, v, prefix_k, prefix_v = make_inputs(Case("plain")).tensors
    with pytest.raises(ValueError, match="^k: expected head_dim 32 as in q"):
        prefix_kernels.explain_backends(q, k[..., :-1], v, prefix_k, prefix_v)
    with pytest.raises(TypeError, match="cu_seqlens_k"):
        prefix_kernels.explain_backends(q, k, v, prefix_k, prefix_v, cu_seqlens_k=torch.tensor([0]))
    for function in (prefix_kernels.explain_backends, prefix_kernels.workspace_bytes):
        with pytest.raises(TypeError, match="^got an unexpected keyword argument 'casual'$"):
            function(q, k, v, prefix_k, prefix_v, casual=True)
        with pytest.raises(TypeError, match="^missing a required"):
            function(q[0], k[0], v[0], prefix_k, prefix_v, cu_seqlens_q=torch.tensor([0, 4]))


def test_wide_heads_prefer_stock_kernels_on_a_gpu():
    problem = prefix_kernels.api._dense_inputs(*make_inputs(Case("plain", head_dim=128)).tensors).problem()
    wide = problem._replace(head_dim=256)  # float32
    assert select.preferred(problem) == select.preferred(wide) == select.BACKENDS
    assert select.preferred(wide._replace(device="cuda"))[:2] == ("cuda", "sdpa")
    assert set(select.preferred(wide._replace(device="cuda"))) == set(select.BACKENDS)


def test_float32_prefers_stock_kernels_on_a_gpu_but_in_decoding():
    problem = prefix_kernels.api._dense_inputs(*make_inputs(Case("plain", q_len=9)).tensors).problem()._replace(device="cuda")
    assert select.preferred(problem)[0] == "sdpa"
    assert select.preferred(problem._replace(dtype=torch.float16))[0] != "sdpa"
    assert select.preferred(problem._replace(q_len=8, head_dim=16))[:2] == ("cpu", "cuda")
    assert set(select.preferred(problem)) == set(select.BACKENDS)


@pytest.mark.parametrize(("first", "dtype", "q_len", "head_dim"), [
    ("triton", torch.bfloat16, 512, 64), ("triton", torch.float16, 9, 128), ("triton", torch.bfloat16, 1, 64),
    ("triton", torch.float32, 8, 64), ("sdpa", torch.float32, 9, 64), ("sdpa", torch.float32, 1, 256),
])  # fmt: skip
def test_who_takes_a_bias_on_a_gpu(first, dtype, q_len, head_dim):
    """cuda takes none."""
    inputs = make_inputs(Case("bias", kv_len=512, bias=(1, 0, 1, 0)), dtype)
    problem = prefix_kernels.api._dense_inputs(*inputs.tensors, **inputs.options).problem()
    problem = problem._replace(device="cuda", q_len=q_len, head_dim=head_dim, value_dim=head_dim)
    assert problem.has_bias and next(name for name in select.preferred(problem) if name not in ("cpu", "cuda")) == first


def test_wide_heads_where_triton_was_measured_to_win(monkeypatch):
    problem = prefix_kernels.api._dense_inputs(*make_inputs(Case("plain"), torch.bfloat16).tensors).problem()
    problem = problem._replace(device="cuda", head_dim=256, value_dim=256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for change in ({}, {"window": 3}, {"gradients": True}, {"head_dim": 144}, {"dtype": torch.float16}):
        assert select.preferred(problem._replace(**change))[:3] == ("cuda", "triton", "sdpa"), change
    assert select.preferred(problem._replace(dtype=torch.float32))[:2] == ("cuda", "sdpa")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert select.preferred(problem)[:2] == ("cuda", "sdpa")


@pytest.mark.parametrize(
    ("first", "batch", "kv_len", "head_dim", "prefix_len", "bank"),
    [
        ("triton", 8, 128, 128, 2048, False), ("cuda", 8, 128, 128, 2048, True), ("cuda", 8, 128, 128, 2047, False),
        ("cuda", 64, 1024, 128, 704, False), ("triton", 64, 1024, 128, 705, False), ("triton", 64, 1024, 64, 1500, False),
        ("cuda", 8, 1024, 128, 2048, False), ("triton", 64, 4096, 128, 2048, False), ("triton", 8, 512, 64, 2048, False),
        ("cuda", 256, 4096, 64, 16, False), ("cuda", 1, 128, 128, 9000, False), ("cuda", 64, 4096, 256, 9000, False),
        ("cuda", 64, 4096, 96, 64, False), ("triton", 64, 4096, 96, 65, False), ("triton", 65, 4096, 96, 64, False),
        ("cuda", 2, 16384, 128, 6144, False), ("triton", 2, 16384, 128, 6145, False),
    ],
)  # fmt: skip
def test_who_decodes_on_a_gpu(first, batch, kv_len, head_dim, prefix_len, bank):
    problem = prefix_kernels.api._dense_inputs(*make_inputs(Case("plain", q_len=1), torch.bfloat16).tensors).problem()
    problem = problem._replace(
        device="cuda", batch=batch, heads=16, kv_heads=8, kv_len=kv_len, k_tokens=batch * kv_len, q_tokens=batch,
        head_dim=head_dim, value_dim=head_dim, prefix_len=prefix_len, has_prefix_ids=bank,
    )  # fmt: skip
    names = [name for name in select.preferred(problem) if name != "cpu"]
    assert names[0] == first and {*names, "cpu"} == set(select.BACKENDS)


@pytest.mark.parametrize(("first", "kv_heads", "prefix_len"), [("cuda", 16, 2047), ("triton", 16, 2048), ("triton", 8, 2047)])
def test_key_heads_of_ones_own_on_a_gpu(first, kv_heads, prefix_len):
    problem = prefix_kernels.api._dense_inputs(*make_inputs(Case("plain", q_len=1), torch.bfloat16).tensors).problem()
    sizes = {"batch": 256, "heads": 16, "kv_heads": kv_heads, "kv_len": 128, "head_dim": 64, "value_dim": 64}
    problem = problem._replace(device="cuda", k_tokens=256 * 128, q_tokens=256, prefix_len=prefix_len, **sizes)
    assert next(name for name in select.preferred(problem) if name != "cpu") == first


def test_available_backends():
    """Those of BACKENDS that run here; the order is that of preference."""
    available, inputs = prefix_kernels.available_backends(), make_inputs(Case("plain"))
    explained = prefix_kernels.explain_backends(*inputs.tensors)
    assert set(available) == {name for name, line in explained.items() if not line.startswith("refused")}
    assert list(available) == [name for name in select.BACKENDS if name in available]
    assert available[-2:] == ("sdpa", "reference")
    for name in prefix_kernels.available_backends():
        inputs.call(backend=name)
