"""Training a model that does not lie on one device: accelerate places it, or processes share it."""

import pytest
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from transformers.modeling_outputs import CausalLMOutput

from prefix_tuning import PrefixTrainer, attach_prefix
from prefix_tuning.loss import loss_at
from support.models import dispatched, random_prefix, tiny_model
from support.tokenizer import tiny_tokenizer
from support.training import PREFIX_LEN, ROWS, arguments, assert_prefixes_close, losses, trained


def test_a_model_in_several_places_is_trained_where_it_is(tmp_path):
    """Trainer moves models; the weights of this one are on disk until they are needed."""
    model = tiny_model("llama")
    expected = trained(tmp_path / "whole", model)
    split = dispatched(model, tmp_path / "disk", ("disk", "cpu", "disk"))
    trainer = trained(tmp_path / "split", split, random_prefix(model, PREFIX_LEN))
    assert next(split.model.layers[0].parameters()).is_meta
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)
    assert_prefixes_close(trainer.prefix, expected.prefix, atol=1e-6, rtol=1e-5)


def test_several_gpus_that_hold_a_model_need_no_warning(tmp_path, caplog):
    args = arguments(tmp_path)
    args._n_gpu = 2
    split = dispatched(tiny_model("llama"), tmp_path / "disk", ("cpu", "disk", "disk"))
    prefix = random_prefix(tiny_model("llama"), PREFIX_LEN)
    trainer = PrefixTrainer(split, prefix, args, train_dataset=ROWS, processing_class=tiny_tokenizer())
    assert trainer.args.n_gpu == 1 and "GPUs are visible" not in caplog.text


class OnTwoDevices(torch.nn.Module):
    """The end of a model whose layers accelerate has spread: logits come back to where the inputs are."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.head = first, torch.nn.Linear(4, 8, device="meta")
        self.head.weight, self.head.bias = (torch.nn.Parameter(torch.ones(size, device=second)) for size in ((8, 4), 8))

    def get_input_embeddings(self):
        return None

    def get_output_embeddings(self):
        return self.head

    def forward(self, hidden, **kwargs):
        return CausalLMOutput(logits=self.head(hidden).to(self.first))


def test_the_loss_of_a_model_on_two_devices():
    """With tensors without memory, which know their device and refuse to be mixed with those of another."""
    first, second = torch.device("cpu"), torch.device("cuda:0")
    with FakeTensorMode(), torch.no_grad():
        model, places = OnTwoDevices(first, second), torch.ones(3, dtype=torch.long)
        assert loss_at(model, places, places, hidden=torch.ones(2, 5, 4, device=second)).device == first


def test_a_model_that_is_split_over_processes_is_refused():
    """As tensor parallelism and FSDP split it; here over a single process."""
    model = tiny_model("llama")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)))
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(NotImplementedError, match="model: its weights are split over several processes"):
            attach_prefix(model, random_prefix(model, PREFIX_LEN))
    finally:
        distributed.destroy_process_group()
