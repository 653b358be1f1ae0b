// What the operators of both libraries do with tensors, through torch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>

namespace prefix_kernels {

// An uninitialised tensor where `like` is. torch::stable::new_empty looks its operator up by name, which takes the host as long as a
// small kernel.
template <size_t N>
torch::stable::Tensor empty(const torch::stable::Tensor& like, const std::array<int64_t, N>& sizes,
                            const std::array<int64_t, N>& strides, int32_t dtype) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype, device, index, &made));
  return torch::stable::Tensor(made);
}

inline int32_t dtype_of(const torch::stable::Tensor& tensor) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

}  // namespace prefix_kernels
