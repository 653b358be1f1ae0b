"""Kernels are told apart by their names."""

import pytest
import torch

from device_profile import KINDS, by_kind, device_profile

NAMES = {
    "attention": (
        "dprefix_kernel", "hopper_kernel", "hopper_dq_kernel", "sum_splits_kernel",
        "void prefix_kernels::cuda::merge_kernel<prefix_kernels::cuda::bfloat16, 64>(prefix_kernels::cuda::DecodeCall)",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits>",
    ),
    "concatenation": ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>>",),
    "products": (
        "nvjet_sm90_tst_64x72_64x12_2x1_v_bz_TNT", "void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_128x64>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
    ),
    "loss": ("void (anonymous namespace)::cunn_SoftMaxForward<4, float>", "nll_loss_forward_reduce_cuda_kernel_2d"),
    "optimiser": ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>>",),
    "rest": (
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl>", "Memset (Device)",
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}::operator()() const::{lambda()#12}::operator()() const::{lambda(float)#1}>",
    ),
}  # fmt: skip


def test_names():
    for kind, names in NAMES.items():
        seconds = by_kind((name, 2.0) for name in names)
        assert {name for name, each in seconds.items() if each} == {kind, "kernels"} and seconds["kernels"] == len(names)
        assert seconds[kind] == 2.0 * len(names)
    assert set(NAMES) == {*KINDS, "rest"}


def test_ranges_are_no_kernels():
    assert by_kind([("Optimizer.step#AdamW.step", 1.0), ("gemm", 0.5)]) == by_kind([("gemm", 0.5)])


@pytest.mark.gpu
def test_on_a_gpu():
    a = torch.randn(512, 512, device="cuda")
    seconds = device_profile(lambda: torch.cat([a @ a, a]))
    assert seconds["kernels"] >= 2 and seconds["products"] > 0 and seconds["concatenation"] > 0
