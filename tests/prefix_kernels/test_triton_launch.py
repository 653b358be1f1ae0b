"""Launches find a compiled kernel again by a key: it must tell apart whatever Triton compiles separately."""

import pytest
import torch

pytest.importorskip("triton")
from prefix_kernels import api
from prefix_kernels.backends.triton import launch, tile_sizes
from prefix_kernels.backends.triton.rows import MAX_TOKEN_STRIDE, Tokens, bias_of, tokens

CPU = torch.device("cpu")


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """As a @triton.jit function: kernel[grid](...) compiles, launches and gives the compiled kernel."""

    arg_names = ("x", "length", "BLOCK")

    def __init__(self):
        self.compiled, self.calls = [], []

    def __getitem__(self, grid):
        def call(**values):
            self.calls.append((grid, values))
            self.compiled.append(Compiled())
            return self.compiled[-1]

        return call


def test_a_known_key_launches_what_was_compiled_with_arguments_in_order():
    kernel, other = Kernel(), Kernel()
    launch.run(kernel, 3, CPU, "key", {"length": 5, "x": "a", "BLOCK": 16, "another kernel's": 1}, num_warps=4)
    assert kernel.calls == [((3,), {"length": 5, "x": "a", "BLOCK": 16, "num_warps": 4, "enable_fp_fusion": True})]
    launch.run(kernel, 7, CPU, "key", {"BLOCK": 16, "length": 6, "x": "b"}, num_warps=4)
    assert len(kernel.calls) == 1 and kernel.compiled[0].launches == [((7, 1, 1), ("b", 6, 16))]
    launch.run(kernel, 7, CPU, "another key", {"BLOCK": 16, "length": 6, "x": "b"})
    launch.run(kernel, 7, torch.device("meta"), "key", {"BLOCK": 16, "length": 6, "x": "b"})
    launch.run(other, 7, CPU, "key", {"BLOCK": 16, "length": 6, "x": "b"})
    assert len(kernel.calls) == 3 and len(other.calls) == 1


def test_dependent_launches(monkeypatch):
    """Only where a kernel asks for one, the architecture knows it, and it is not switched off; each is compiled by itself."""
    kernel, values, meta = Kernel(), {"x": 1, "length": 2, "BLOCK": 16}, torch.device("meta")
    kernel.arg_names = (*Kernel.arg_names, "DEPENDENT")
    for architecture in (80, 90, 90):
        monkeypatch.setattr(launch.tile_sizes, "architecture_of", lambda device, architecture=architecture: architecture)
        launch.run(kernel, 1, meta, "key", values, dependent=True)
    monkeypatch.setattr(launch, "DEPENDENT_LAUNCHES", False)
    launch.run(kernel, 1, meta, "another key", values, dependent=True)
    launch.run(kernel, 1, CPU, "key", values, dependent=True)
    given = [(values["DEPENDENT"], values.get("launch_pdl")) for _, values in kernel.calls]
    assert given == [(False, None), (True, True), (False, None), (False, None)]
    other = Kernel()
    launch.run(other, 1, meta, "key", values)
    assert other.calls == [((1,), {**values, "enable_fp_fusion": True})]


def test_what_is_compiled_gets_tensors_and_what_is_launched_again_gets_addresses():
    kernel, tensor = Kernel(), torch.zeros(1, 2, 64, 16)
    rows = launch.rows_of(api._dense_inputs(tensor, tensor, tensor, tensor[0], tensor[0], key_lens=torch.tensor([5])))
    values = {"x": tokens(tensor), "length": rows, "BLOCK": torch.nn.Parameter(tensor)}
    launch.run(kernel, 1, CPU, "key", values)
    ((_, compiled_for),) = kernel.calls
    assert compiled_for["x"] == Tokens(tensor, 2048, 1024, 16) and compiled_for["length"] is rows.value
    launch.run(kernel, 1, CPU, "key", values)
    ((_, launched),) = kernel.compiled[0].launches
    none, address = (None,) * 2, rows.value.key_lens.data_ptr()
    assert launched == ((tensor.data_ptr(), 2048, 1024, 16), (*none, address, *none, *none), tensor.data_ptr())


def test_a_float32_prefix_is_rounded_and_another_is_left_alone():
    q, prefix = torch.zeros(1, 2, 4, 16, dtype=torch.bfloat16), torch.randn(2, 3, 16)
    rounded = launch.rounded_prefix(api._dense_inputs(q, q, q, prefix, 2 * prefix))
    assert all(torch.equal(a, b[None].bfloat16()) for a, b in zip(rounded, (prefix, 2 * prefix), strict=True))
    same = launch.rounded_prefix(api._dense_inputs(q, q, q, prefix.bfloat16(), rounded[1][0]))
    assert same[1].data_ptr() == rounded[1].data_ptr()


def test_a_kernel_without_result_is_asked_again():
    kernel = Kernel()
    kernel.__class__ = type("Interpreted", (Kernel,), {"__getitem__": lambda self, grid: lambda **v: self.calls.append(v)})
    for _ in range(2):
        launch.run(kernel, 1, CPU, "key", {"x": 1, "length": 2, "BLOCK": 16})
    assert len(kernel.calls) == 2


def test_the_number_of_keys_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "MOST_COMPILED", 5)
    kernel = Kernel()
    for key in range(20):
        launch.run(kernel, 1, CPU, key, {"x": 1, "length": 2, "BLOCK": 16})
        assert len(launch._compiled) <= 5


def test_keys_tell_apart_what_triton_specialises():
    base = torch.zeros(1, 2, 64, 16)
    same = [tokens(base), tokens(torch.zeros(1, 2, 64, 16))]
    shifted = torch.zeros(2 * 64 * 16 + 1)[1:].view(1, 2, 64, 16)
    others = [tokens(shifted), tokens(base.bfloat16()), tokens(base.transpose(1, 2)), tokens(torch.zeros(1, 2, 32, 16)), None]
    assert launch.key_of(same[0]) == launch.key_of(same[1])
    assert len({launch.key_of(each) for each in [same[0], *others]}) == 1 + len(others)
    vector = torch.zeros(9)
    assert launch.key_of(vector) != launch.key_of(vector[1:]) and launch.key_of(vector) != launch.key_of(vector.long())


def test_a_bias_is_read_where_it_lies():
    """An axis of one is read again and again; only where columns are not side by side it is copied."""
    q, prefix = torch.zeros(2, 4, 3, 16), torch.zeros(4, 5, 16)
    for shape, strides in (
        ((2, 4, 3, 8), (96, 24, 8)), ((4, 1, 8), (0, 8, 0)), ((2, 1, 3, 8), (24, 0, 8)), ((1, 8), (0, 0, 0)),
        ((2, 1, 1, 1), (8, 0, 0)),
    ):  # fmt: skip
        bias = torch.zeros(shape)
        operand, vector = bias_of(api._dense_inputs(q, q, q, prefix, prefix, bias=bias))
        assert vector == 1
        assert operand.value[1:] == operand.addressed[1:] == strides
        assert (operand.addressed[0] == bias.data_ptr()) == (shape[-1] > 1)
    transposed = torch.zeros(3, 4, 8).transpose(0, 1)
    operand, _ = bias_of(api._dense_inputs(q, q, q, prefix, prefix, bias=transposed))
    assert operand.addressed == (transposed.data_ptr(), 0, 8, 32)
    assert bias_of(api._dense_inputs(q, q, q, prefix, prefix)) == (None, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_is_copied_where_its_columns_do_not_lie_in_vectors(dtype):
    vector = 16 // dtype.itemsize

    def read(prefix_len, kv_len, bias):
        q, k, prefix = (torch.zeros(*shape, 16, dtype=torch.bfloat16) for shape in ((2, 4, 3), (2, 4, kv_len), (4, prefix_len)))
        inputs = api._dense_inputs(q, k, k, prefix, prefix, bias=bias, causal=False)
        operand, read_at_a_time = bias_of(inputs, in_vectors=True)
        assert read_at_a_time == vector
        return operand.value

    def random(*shape):
        return torch.randn(*shape).to(dtype)

    whole = random(1, 4, 3, 4 * vector)
    longer = random(1, 4, 3, 5 * vector)
    step = MAX_TOKEN_STRIDE + vector  # from query to query; offsets within a block of queries are 32 bit
    far = torch.empty(3 * step, dtype=dtype).as_strided((1, 1, 3, 4 * vector), (0, 0, step, 1)).zero_()
    ends_early = random(12 * 2 * vector - vector + 2).as_strided((1, 4, 3, vector + 2), (0, 6 * vector, 2 * vector, 1))
    for kv_len, bias in (
        (3 * vector, whole), (4 * vector, longer), (4 * vector - 1, longer[..., :-1]),  # the last vector is in memory
        (3 * vector, whole[:, :, :1]), (3 * vector, whole.expand(2, -1, -1, -1)),
    ):  # fmt: skip
        assert read(vector, kv_len, bias).pointer.data_ptr() == bias.data_ptr()
    for prefix_len, kv_len, bias in (
        (vector, 3 * vector - 1, random(1, 4, 3, 4 * vector - 1)),
        (vector - 1, 3 * vector, random(2, 1, 3, 4 * vector - 1)),
        (vector + 1, 2, random(1, 4, 1, vector + 3)),
        (vector, 3 * vector, random(1, 4, 3, 4 * vector + 1)[..., 1:]),
        (vector, 3 * vector, random(12 * 4 * vector + 1)[1:].view(1, 4, 3, -1)),
        (vector, 2, ends_early), (vector, 3 * vector, far),
        (3, 2, random(1, 4, 3, 1).expand(-1, -1, -1, 5)), (3, 2, random(1, 1, 3, 5).expand(2, 4, -1, -1)),
    ):  # fmt: skip
        copied = read(prefix_len, kv_len, bias)
        own_column = -(-prefix_len // vector) * vector
        axes = zip(bias.shape[:-1], bias.stride()[:-1], strict=True)
        assert copied.pointer.shape[:-1] == tuple(size if stride else 1 for size, stride in axes)
        bias = bias.expand(2, 4, 3, -1)
        assert copied.pointer.data_ptr() != bias.data_ptr() and copied.pointer.data_ptr() % 16 == 0
        assert copied.pointer.shape[-1] % vector == 0 and all(stride % vector == 0 for stride in copied[1:])
        values = copied.pointer.expand(2, 4, 3, -1)
        assert torch.equal(values[..., :prefix_len], bias[..., :prefix_len])
        assert torch.equal(values[..., own_column : own_column + kv_len], bias[..., prefix_len:])


def test_a_bias_has_tiles_of_its_own_where_it_needs_them(monkeypatch):
    monkeypatch.setattr(tile_sizes, "architecture_of", lambda device: 90)
    for dim, biased in ((64, tile_sizes.BIASED), (256, tile_sizes.TABLE)):
        q, prefix = (torch.zeros(*shape, dim, dtype=torch.bfloat16, device="meta") for shape in ((1, 2, 4), (2, 3)))
        for bias, table in ((None, tile_sizes.TABLE), (torch.zeros(7, device="meta"), biased)):
            call = launch.Call(api._dense_inputs(q, q, q, prefix, prefix, bias=bias))
            assert call.tile("dkeys") is table["dkeys", 90, 16, dim]


@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_numbers_are_floats(option):
    """Triton compiles a kernel of its own for the int 1, which the key of another int would find."""
    q, prefix = torch.zeros(1, 2, 4, 16), torch.zeros(2, 3, 16)
    for value in (1, 2, 1.0):
        inputs = api._dense_inputs(q, q, q, prefix, prefix, **{option: value})
        (lengths, _, _), cu_seqlens = launch._numbers(inputs.problem(), inputs.scale, None, None), torch.tensor([0, 2])
        assert (type(lengths[option]), lengths[option]) == (float, value)
        packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 2, "max_seqlen_k": 2, option: value}
        tokens = torch.zeros(2, 2, 16)
        assert type(getattr(api._varlen_inputs(tokens, tokens, tokens, prefix, prefix, **packed), option)) is float


def test_host_arithmetic():
    assert [launch.cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [launch.next_power_of_2(n) for n in (1, 2, 3, 16, 17, 80)] == [1, 2, 4, 16, 32, 128]
