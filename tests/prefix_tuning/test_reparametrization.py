"""The MLP behind a prefix: its formula, where each number goes, and its fit to given keys and values."""

import pytest
import torch

from prefix_tuning.reparametrization import MLPReparametrization

SIZES = {"layers": 3, "kv_heads": 2, "head_dim": 4, "value_dim": 6}
PREFIX_LEN, EMBEDDING_DIM, HIDDEN_SIZE = 5, 7, 8


def make_mlp(**changes):
    return MLPReparametrization(PREFIX_LEN, EMBEDDING_DIM, HIDDEN_SIZE, **{**SIZES, **changes})


def make_layers(dtype=torch.float32):
    return [(torch.randn(2, PREFIX_LEN, 4).to(dtype), torch.randn(2, PREFIX_LEN, 6).to(dtype)) for _ in range(SIZES["layers"])]


def test_formula_and_the_place_of_every_number():
    """[prefix_len, keys of all layers, then values], each part by layer, then head, then dimension."""
    mlp = make_mlp()
    hidden = torch.tanh(mlp.embedding.weight @ mlp.hidden.weight.T + mlp.hidden.bias)
    flat = hidden @ mlp.output.weight.T + mlp.output.bias
    keys, values = flat[:, : 3 * 2 * 4].reshape(PREFIX_LEN, 3, 2, 4), flat[:, 3 * 2 * 4 :].reshape(PREFIX_LEN, 3, 2, 6)
    layers = mlp()
    assert len(layers) == 3
    for index, (key, value) in enumerate(layers):
        assert key.is_contiguous() and value.is_contiguous()
        torch.testing.assert_close(key, keys[:, index].transpose(0, 1))
        torch.testing.assert_close(value, values[:, index].transpose(0, 1))


def test_parameters():
    shapes = {name: tuple(parameter.shape) for name, parameter in make_mlp().named_parameters()}
    assert shapes == {
        "embedding.weight": (5, 7), "hidden.weight": (8, 7), "hidden.bias": (8,), "output.weight": (60, 8), "output.bias": (60,)
    }  # fmt: skip
    assert {p.dtype for p in make_mlp(device="meta").parameters()} == {torch.float32}


def test_gradients_of_all_layers_reach_all_parameters():
    mlp = make_mlp()
    layers = mlp()
    for index in range(len(layers)):
        for tensor in layers[index]:
            grads = torch.autograd.grad(tensor.square().sum(), list(mlp.parameters()), retain_graph=True)
            assert all(grad.abs().max() > 0 for grad in grads)


def test_autocast_changes_nothing():
    mlp = make_mlp()
    expected = mlp()
    with torch.autocast("cpu", torch.bfloat16):
        got = mlp()
    for pair, expected_pair in zip(got, expected, strict=True):
        assert all(torch.equal(tensor, wanted) for tensor, wanted in zip(pair, expected_pair, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fit_gives_the_layers_and_the_error_it_says(dtype):
    """float32 weights also for 16-bit targets; nothing of the fit stays behind."""
    mlp, layers = make_mlp(), make_layers(dtype)
    state = torch.get_rng_state()
    with torch.no_grad():
        left = mlp.fit(layers)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in mlp.parameters())
    errors = [
        (got - wanted.float()).square().flatten()
        for pair, target in zip(mlp(), layers, strict=True)
        for got, wanted in zip(pair, target, strict=True)
    ]
    assert left == pytest.approx(torch.cat(errors).mean().item(), rel=1e-3)
    assert left < 0.5


def test_fit_of_a_wider_mlp_is_close_and_repeatable():
    layers, fitted = make_layers(), []
    for _ in range(2):
        torch.manual_seed(1)
        mlp = MLPReparametrization(PREFIX_LEN, 32, 64, **SIZES)
        assert mlp.fit(layers) < 1e-4
        fitted.append(torch.nn.utils.parameters_to_vector(mlp.parameters()))
    assert torch.equal(*fitted)
