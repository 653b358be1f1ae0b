// The operators prefix_kernels_cuda::{decode, part_values, code, machine_code}. The only file of the CUDA library that includes
// torch, through its stable ABI; it builds against a torch without CUDA. prefix_kernels/backends/cuda.py is the caller; it has
// checked the problem.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/decode.h"
#include "cuda/runtime.h"
#include "tensors.h"

#ifndef PREFIX_KERNELS_DEVICE  // the tests build the same operators for the host, under other names
#define PREFIX_KERNELS_DEVICE CUDA
#define PREFIX_KERNELS_OPERATORS prefix_kernels_cuda
#endif
#define OPERATORS(name, m) STABLE_TORCH_LIBRARY(name, m)
#define OPERATORS_FOR(name, device, m) STABLE_TORCH_LIBRARY_IMPL(name, device, m)

namespace prefix_kernels::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// libtorch_cuda.so, which has the function, is not there at all beside a torch without CUDA.
void* current_stream(const Tensor& tensor) {
  using Function = AOTITorchError (*)(int32_t, void**);
  if (!tensor.is_cuda()) return nullptr;
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "torch has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(tensor.get_device_index(), &stream));
  return stream;
}

// Itself; a copy where the kernels cannot use its strides.
Tensor readable(const Tensor& tensor) {
  return tensor.stride(-1) == 1 && tensor.stride(-2) <= INT32_MAX ? tensor : torch::stable::contiguous(tensor);
}

MaybeTensor contiguous(const MaybeTensor& tensor) {
  if (!tensor || tensor->stride(-1) == 1) return tensor;
  return torch::stable::contiguous(*tensor);
}

// [rows, heads, tokens, head_dim] of 16-bit elements, or one prefix without the first axis
Tokens tokens(const Tensor& tensor) {
  const int64_t row = tensor.dim() == 3 ? 0 : tensor.stride(0);
  Tokens result{tensor.const_data_ptr(), row, tensor.stride(-3), tensor.stride(-2), false};
  const bool strides = result.row % VECTOR == 0 && result.head % VECTOR == 0 && result.token % VECTOR == 0;
  result.aligned = strides && reinterpret_cast<uintptr_t>(result.data) % (2 * VECTOR) == 0;
  return result;
}

Indices indices(const MaybeTensor& tensor) {
  if (!tensor) return {nullptr, false};
  return {tensor->const_data_ptr(), tensor->scalar_type() == ScalarType::Long};
}

Schedule checked_schedule(const Sizes& sizes) {
  STD_TORCH_CHECK(sizes.multiprocessors > 0, "the CUDA device cannot be asked for its multiprocessors");
  const Schedule schedule = schedule_of(sizes);
  STD_TORCH_CHECK(std::max(schedule.items(), schedule.merged_queries()) <= INT32_MAX, "too many rows for one call: ", sizes.batch);
  return schedule;
}

// (out, lse), both new. out lies token by token, as the output projection of a model reads it.
std::tuple<Tensor, Tensor> decode(
    const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& given_prefix_k,
    const Tensor& given_prefix_v, MaybeTensor key_mask, MaybeTensor key_lens, MaybeTensor prefix_ids, MaybeTensor prefix_lens,
    bool causal, double scale, int64_t window, double softcap, int64_t first_key_position) {
  const Tensor q = readable(given_q), k = readable(given_k), v = readable(given_v);
  const Tensor prefix_k = readable(given_prefix_k), prefix_v = readable(given_prefix_v);
  key_mask = contiguous(key_mask), key_lens = contiguous(key_lens);
  prefix_ids = contiguous(prefix_ids), prefix_lens = contiguous(prefix_lens);
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), head_dim = q.size(3), token = heads * head_dim;
  const int32_t float32 = aoti_torch_dtype_float32();
  const Tensor out = empty<4>(q, {batch, heads, q_len, head_dim}, {q_len * token, head_dim, token, 1}, dtype_of(q));
  const Tensor lse = empty<3>(q, {batch, heads, q_len}, {heads * q_len, q_len, 1}, float32);
  if (batch == 0 || heads == 0 || q_len == 0) return {out, lse};
  constexpr int64_t FAR = int64_t(1) << 30;  // a window that is wider hides nothing; sums of two stay below 2³¹
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (q.is_cuda()) guard.emplace(q.get_device_index());
  void* stream = current_stream(q);

  const int64_t prefixes = prefix_k.dim() == 3 ? 1 : prefix_k.size(0), prefix_len = prefix_k.size(-2);
  const Sizes sizes{batch, heads, k.size(1), q_len, k.size(2), head_dim, prefixes, prefix_len, window, multiprocessors(),
                    largest_cluster(), causal, prefix_ids.has_value()};
  DecodeCall call{};
  call.schedule = checked_schedule(sizes);
  call.q = tokens(q), call.k = tokens(k), call.v = tokens(v);
  call.prefix_k = tokens(prefix_k), call.prefix_v = tokens(prefix_v);
  call.out = out.data_ptr(), call.lse = static_cast<float*>(lse.data_ptr());
  call.key_lens = indices(key_lens), call.prefix_ids = indices(prefix_ids), call.prefix_lens = indices(prefix_lens);
  if (key_mask) {
    call.key_mask = static_cast<const uint8_t*>(key_mask->const_data_ptr());
    call.key_mask_row = key_mask->stride(0);
  }
  call.batch = int(batch), call.heads = int(heads), call.q_len = int(q_len), call.kv_len = int(k.size(2));
  call.prefixes = int(prefixes), call.prefix_len = int(prefix_len);
  call.causal = causal;
  call.scale = float(softcap > 0 ? scale / softcap : scale * LOG2_E), call.softcap = float(softcap * LOG2_E);
  call.window = int(std::min(window, FAR));
  call.slides = window > 0 && first_key_position >= 0;
  call.slide = int(std::clamp(first_key_position - window, -FAR, FAR));

  std::optional<Tensor> parts;
  if (call.schedule.merges()) {
    parts = empty<1>(q, {part_values(call.schedule, head_dim)}, {1}, float32);
    call.parts = static_cast<float*>(parts->data_ptr());
    static const uint64_t seal = uint64_t(std::random_device{}()) << 32 | std::random_device{}();
    call.seal = seal;
  }
  const int error = launch_decode(call, q.scalar_type() == ScalarType::BFloat16, int(head_dim), stream);
  STD_TORCH_CHECK(error == 0, "the decoding kernel was not launched: ", error_name(error));
  return {out, lse};
}

// How many float32 numbers a call takes for partial results.
int64_t values_of_parts(int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len, int64_t head_dim,
                        int64_t prefixes, int64_t prefix_len, int64_t window, bool causal, bool bank) {
  if (batch == 0 || heads == 0 || q_len == 0) return 0;
  const Sizes sizes{batch, heads, kv_heads, q_len, kv_len, head_dim, prefixes, prefix_len, window, multiprocessors(),
                    largest_cluster(), causal, bank};
  return part_values(checked_schedule(sizes), head_dim);
}

// Of the kernel for a head_dim on the current device: the architecture that its machine code was compiled for and the virtual
// one of its source, as 10 · major + minor; registers of a thread, bytes of local memory, bytes of shared memory.
std::vector<int64_t> code(int64_t head_dim, bool bfloat16) {
  KernelInfo info{};
  const int error = describe_decode(bfloat16, int(head_dim), &info);
  STD_TORCH_CHECK(error == 0, "the CUDA device has no code for this kernel: ", error_name(error));
  return {info.binary_version, info.ptx_version, info.registers, info.spilled_bytes, info.shared_bytes};
}

// What the current device runs: code for its architecture, or PTX for an older one that its driver has compiled.
std::string machine_code() {
  const std::vector<int64_t> versions = code(128, true);
  const std::string runs = "sm_" + std::to_string(versions[0]);
  if (versions[0] == versions[1]) return runs;
  return runs + ", compiled by the driver from PTX for sm_" + std::to_string(versions[1]);
}

}  // namespace
}  // namespace prefix_kernels::cuda

OPERATORS(PREFIX_KERNELS_OPERATORS, m) {
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? key_mask, Tensor? key_lens, "
      "Tensor? prefix_ids, Tensor? prefix_lens, bool causal, float scale, int window, float softcap, "
      "int first_key_position) -> (Tensor, Tensor)");
  m.def(
      "part_values(int batch, int heads, int kv_heads, int q_len, int kv_len, int head_dim, int prefixes, int prefix_len, "
      "int window, bool causal, bool bank) -> int");
  m.def("code(int head_dim, bool bfloat16) -> int[]");
  m.def("machine_code() -> str");
}

OPERATORS_FOR(PREFIX_KERNELS_OPERATORS, PREFIX_KERNELS_DEVICE, m) {
  m.impl("decode", TORCH_BOX(&prefix_kernels::cuda::decode));
}

OPERATORS_FOR(PREFIX_KERNELS_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("part_values", TORCH_BOX(&prefix_kernels::cuda::values_of_parts));
  m.impl("code", TORCH_BOX(&prefix_kernels::cuda::code));
  m.impl("machine_code", TORCH_BOX(&prefix_kernels::cuda::machine_code));
}
