// The operators prefix_kernels_cpu::{forward, forward_rows, backward, isa}. The only file of the CPU library that includes
// torch, through its stable ABI: one build serves every torch from 2.11 on. prefix_kernels/backends/cpu.py is the caller; it
// has checked shapes and dtypes and made every index int64.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "tensors.h"

namespace prefix_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

Strided strided(const Tensor& tensor, int64_t row, int64_t token, int64_t head) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "expected float32, bfloat16 or float16");
  const Element in_16_bit = type == ScalarType::BFloat16 ? Element::bfloat16 : Element::float16;
  return {tensor.data_ptr(), type == ScalarType::Float ? Element::float32 : in_16_bit, row, token, head, tensor.size(-1)};
}

// Kernels see rows of whole vectors.
int64_t whole(int64_t dim) { return (dim + 15) / 16 * 16; }

// [batch, heads, len, dim], or [tokens, heads, dim] where varlen
Strided rows(const Tensor& tensor, bool varlen) {
  return varlen ? strided(tensor, 0, tensor.stride(0), tensor.stride(1))
                : strided(tensor, tensor.stride(0), tensor.stride(2), tensor.stride(1));
}

// [prefixes, kv_heads, prefix_len, dim], or one prefix without the first axis
Strided bank(const Tensor& tensor) {
  const int64_t heads = tensor.dim() - 3;
  return strided(tensor, heads == 0 ? 0 : tensor.stride(0), tensor.stride(heads + 1), tensor.stride(heads));
}

const int64_t* indices(const MaybeTensor& tensor) {
  return tensor ? static_cast<const int64_t*>(tensor->const_data_ptr()) : nullptr;
}

// [batch or 1, heads or 1, q_len or 1, columns]
Strided broadcast(const Tensor& tensor) {
  const auto stride = [&](int64_t axis) { return tensor.size(axis) == 1 ? 0 : tensor.stride(axis); };
  return strided(tensor, stride(0), stride(2), stride(1));
}

// A call: its problem and what the problem points to.
struct Call {
  Problem problem;
  std::vector<Sequence> sequences;
  std::vector<Tensor> copies;
  int64_t max_q_len = 0;

  // Kernels read along the last axis: a copy where that has gaps.
  Tensor readable(const Tensor& tensor) {
    if (tensor.stride(-1) == 1) return tensor;
    copies.push_back(torch::stable::contiguous(tensor));
    return copies.back();
  }
};

// Values are checked before a call, but for one that was compiled: there they must at least lie within the tensors.
void check_ends(const char* name, const int64_t* ends, int64_t count, int64_t tokens) {
  STD_TORCH_CHECK(ends[0] == 0 && ends[count] == tokens && std::is_sorted(ends, ends + count + 1), name,
                  ": expected values that start at 0, never fall and end at ", tokens, " tokens");
}

Call describe(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
              const MaybeTensor& key_mask, const MaybeTensor& bias, const MaybeTensor& key_lens, const MaybeTensor& prefix_ids,
              const MaybeTensor& prefix_lens, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
              const MaybeTensor& parent, bool causal, double scale, int64_t window, double softcap,
              int64_t first_key_position, const Tensor& out, const Tensor* lse) {
  Call call;
  Problem& p = call.problem;
  const bool varlen = cu_seqlens_q.has_value();
  p.q = rows(call.readable(q), varlen), p.k = rows(call.readable(k), varlen), p.v = rows(call.readable(v), varlen);
  p.out = rows(call.readable(out), varlen);
  p.prefix_k = bank(call.readable(prefix_k)), p.prefix_v = bank(call.readable(prefix_v));
  if (lse) {
    p.lse = static_cast<float*>(lse->data_ptr());
    p.lse_row = varlen ? 0 : lse->stride(0), p.lse_head = lse->stride(varlen ? 0 : 1);
  }
  if (key_mask) {
    const Tensor mask = call.readable(*key_mask);
    p.key_mask = static_cast<const bool*>(mask.const_data_ptr()), p.key_mask_row = mask.stride(0);
  }
  if (bias) p.bias = broadcast(call.readable(*bias));
  p.heads = q.size(1), p.kv_heads = k.size(1), p.head_dim = whole(q.size(-1)), p.value_dim = whole(v.size(-1));
  p.prefixes = prefix_k.dim() == 3 ? 1 : prefix_k.size(0), p.prefix_len = prefix_k.size(-2);
  p.causal = causal, p.scale = scale, p.softcap = softcap;
  p.window = window, p.first_key_position = first_key_position;
  const int64_t *ids = indices(prefix_ids), *lens = indices(prefix_lens), *fill = indices(key_lens);
  const int64_t *ends_q = indices(cu_seqlens_q), *ends_k = indices(cu_seqlens_k), *parents = indices(parent);
  const int64_t count = varlen ? cu_seqlens_q->size(0) - 1 : q.size(0);
  call.sequences.reserve(count);
  if (varlen) {
    check_ends("cu_seqlens_q", ends_q, count, q.size(0));
    check_ends("cu_seqlens_k", ends_k, count, k.size(0));
  }
  for (int64_t i = 0; i < count; ++i) {
    Sequence s{};
    if (varlen) {
      s.first_query = ends_q[i], s.first_key = ends_k[i];
      s.q_len = ends_q[i + 1] - ends_q[i], s.kv_len = ends_k[i + 1] - ends_k[i];
    } else {
      s.row = i, s.q_len = q.size(2), s.kv_len = k.size(2);
      if (fill) s.kv_len = std::clamp<int64_t>(fill[i], 0, s.kv_len);
    }
    s.prefix = ids ? ids[i] : 0;
    if (s.prefix < 0 || s.prefix >= p.prefixes) s.prefix = -1;
    s.prefix_len = s.prefix < 0 ? 0 : lens ? std::clamp<int64_t>(lens[s.prefix], 0, p.prefix_len) : p.prefix_len;
    if (s.prefix_len == 0) s.prefix = -1;
    s.parent = parents ? parents[i] : -1;
    STD_TORCH_CHECK(s.parent < i && (s.parent < 0 || (parents[s.parent] < 0 && call.sequences[s.parent].prefix == s.prefix)),
                    "parent: expected an earlier sequence with the same prefix and no parent, got ", s.parent);
    call.max_q_len = std::max(call.max_q_len, s.q_len);
    call.sequences.push_back(s);
  }
  p.sequences = call.sequences.data(), p.sequence_count = count;
  return call;
}

// Runs tasks that are `flops` of work together, on one thread where waking a second one would take longer than the work.
template <typename Run>
void in_parallel(int64_t tasks, double flops, const Run& run) {
  constexpr double FLOPS_OF_A_THREAD = 3e5;  // some 15 µs of decoding
  if (tasks > 0) torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, int64_t(tasks * FLOPS_OF_A_THREAD / flops)), run);
}

// Of the forward pass over one kind of keys, as if every query saw all of them: `len` is prefix_len or kv_len.
double flops(const Call& call, int64_t Sequence::*len) {
  double pairs = 0;
  for (const Sequence& s : call.sequences) pairs += double(s.q_len) * double(s.*len);
  return 1 + 2.0 * double(call.problem.heads * (call.problem.head_dim + call.problem.value_dim)) * pairs;
}

double all_flops(const Call& call) { return flops(call, &Sequence::prefix_len) + flops(call, &Sequence::kv_len); }

void run_decode(const Call& call, const Kernels& kernel, const Tensor& like) {
  const Problem& p = call.problem;
  const int64_t per_tile = std::max<int64_t>(1, kernel.rows / std::max<int64_t>(1, call.max_q_len * p.group()));
  const DecodeTiles tiles = decode_tiles(call.sequences, per_tile);
  // Few tiles: ranges of 256 columns or more, 8 tasks or so, whatever the number of threads: results do not depend on it, and
  // partial results of many rows are never more than one copy.
  const int64_t tile_count = int64_t(tiles.tile_first.size()) - 1;
  int64_t splits =
      std::clamp<int64_t>(8 / std::max<int64_t>(1, p.kv_heads * tile_count), 1, std::max<int64_t>(1, p.prefix_len / 256));
  if (splits == 1 && tile_count == p.sequence_count) splits = 0;  // nothing is shared
  const int64_t size = splits * p.sequence_count * p.heads * call.max_q_len * (p.value_dim + 2);
  const Tensor partial = size > 0 ? empty<1>(like, {size}, {1}, aoti_torch_dtype_float32()) : Tensor();
  const DecodePlan plan{tiles.order.data(), tiles.tile_first.data(), tile_count, splits,
                        splits > 0 ? (p.prefix_len + splits - 1) / splits : 0, call.max_q_len,
                        size > 0 ? static_cast<float*>(partial.data_ptr()) : nullptr};
  in_parallel(p.kv_heads * plan.tiles * splits, flops(call, &Sequence::prefix_len),
              [&](int64_t begin, int64_t end) { kernel.decode_prefix(p, plan, begin, end); });
  in_parallel(p.kv_heads * p.sequence_count, splits > 0 ? flops(call, &Sequence::kv_len) : all_flops(call),
              [&](int64_t begin, int64_t end) { kernel.decode_own(p, plan, begin, end); });
}

void run_forward(const Call& call, const Tensor& like) {
  const Problem& p = call.problem;
  const Kernels& kernel = kernels();
  if (call.max_q_len * p.group() < kernel.lanes) return run_decode(call, kernel, like);
  const std::vector<int64_t> tile_first = count_tiles(call.sequences, p.group(), kernel.rows);
  in_parallel(p.kv_heads * tile_first.back(), all_flops(call),
              [&](int64_t begin, int64_t end) { kernel.forward(p, tile_first.data(), begin, end); });
}

// New, [batch, heads, q_len, value_dim], token by token in memory, as the output projection of a model reads it.
Tensor rows_out(const Tensor& q, const Tensor& v) {
  const int64_t batch = q.size(0), heads = q.size(1), len = q.size(2), dim = v.size(-1), row = heads * dim;
  return empty<4>(q, {batch, heads, len, dim}, {len * row, dim, row, 1}, dtype_of(q));
}

// (out, lse), both new.
std::tuple<Tensor, Tensor> forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v, MaybeTensor key_mask,
    MaybeTensor bias, MaybeTensor key_lens, MaybeTensor prefix_ids, MaybeTensor prefix_lens, MaybeTensor cu_seqlens_q,
    MaybeTensor cu_seqlens_k, MaybeTensor parent, bool causal, double scale, int64_t window, double softcap,
    int64_t first_key_position) {
  const int64_t heads = q.size(1);
  const int32_t float32 = aoti_torch_dtype_float32();
  Tensor out, lse;
  if (cu_seqlens_q) {
    const int64_t tokens = q.size(0), dim = v.size(-1);
    out = empty<3>(q, {tokens, heads, dim}, {heads * dim, dim, 1}, dtype_of(q));
    lse = empty<2>(q, {heads, tokens}, {tokens, 1}, float32);
  } else {
    const int64_t batch = q.size(0), len = q.size(2);
    out = rows_out(q, v);
    lse = empty<3>(q, {batch, heads, len}, {heads * len, len, 1}, float32);
  }
  if (heads > 0)
    run_forward(describe(q, k, v, prefix_k, prefix_v, key_mask, bias, key_lens, prefix_ids, prefix_lens, cu_seqlens_q,
                         cu_seqlens_k, parent, causal, scale, window, softcap, first_key_position, out, &lse), q);
  return {out, lse};
}

// The same of a batch of rows with nothing further, out alone: an operator takes the host time for each argument
// and result.
Tensor forward_rows(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v,
                    MaybeTensor key_mask, MaybeTensor bias, bool causal, double scale, int64_t window, double softcap,
                    int64_t first_key_position) {
  const Tensor out = rows_out(q, v);
  if (q.size(1) > 0)
    run_forward(describe(q, k, v, prefix_k, prefix_v, key_mask, bias, {}, {}, {}, {}, {}, {}, causal, scale, window, softcap,
                         first_key_position, out, nullptr), q);
  return out;
}

// Adds the slots beyond the bank to the prefix they belong to, in order.
void add_slots(const Tensor& sums, const Tensor& further, const std::vector<int64_t>& prefix_of_slot) {
  const int64_t prefixes = sums.size(0), heads = sums.size(1), per_head = sums.size(2) * sums.size(3);
  if (further.numel() == 0) return;
  const float* from_slots = static_cast<const float*>(further.const_data_ptr());
  float* to_prefixes = static_cast<float*>(sums.data_ptr());
  in_parallel(heads, double(further.numel()), [&](int64_t begin, int64_t end) {
    for (int64_t slot = 0; slot < further.size(0); ++slot)
      for (int64_t head = begin; head < end; ++head) {
        const float* from = from_slots + (slot * heads + head) * per_head;
        float* to = to_prefixes + (prefix_of_slot[prefixes + slot] * heads + head) * per_head;
        for (int64_t i = 0; i < per_head; ++i) to[i] += from[i];
      }
  });
}

// dq, dk, dv are written or, dk and dv (float32), added to; undefined ones are not wanted. Returns the gradients of the bank,
// float32, empty where not wanted.
std::tuple<Tensor, Tensor> backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& prefix_k, const Tensor& prefix_v, MaybeTensor key_mask,
    MaybeTensor bias, MaybeTensor key_lens, MaybeTensor prefix_ids, MaybeTensor prefix_lens, MaybeTensor cu_seqlens_q,
    MaybeTensor cu_seqlens_k, MaybeTensor parent, bool causal, double scale, int64_t window, double softcap,
    int64_t first_key_position, const Tensor& out, const Tensor& lse, const Tensor& dout, MaybeTensor dlse, MaybeTensor dq,
    MaybeTensor dk, MaybeTensor dv, bool wants_prefix_k, bool wants_prefix_v) {
  Call call = describe(q, k, v, prefix_k, prefix_v, key_mask, bias, key_lens, prefix_ids, prefix_lens, cu_seqlens_q, cu_seqlens_k,
                       parent, causal, scale, window, softcap, first_key_position, out, &lse);
  const Problem& p = call.problem;
  const bool varlen = cu_seqlens_q.has_value();
  Gradients g;
  g.dout = rows(call.readable(dout), varlen);
  if (dlse) g.dlse = static_cast<const float*>(dlse->const_data_ptr());
  if (dq) g.dq = rows(*dq, varlen);
  if (dk) g.dk = rows(*dk, varlen);
  if (dv) g.dv = rows(*dv, varlen);
  // About four tasks a thread; more parts than that would only cost memory, one copy of the prefix each.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted_parts = std::clamp<int64_t>((4 * threads + p.kv_heads - 1) / p.kv_heads, 1, 8);
  const BackwardParts plan = backward_parts(call.sequences, p.prefixes, wanted_parts);
  const int64_t further = int64_t(plan.prefix_of_slot.size()) - p.prefixes;
  auto zeros = [&](int64_t count, int64_t dim) {
    return torch::stable::new_zeros(q, {count, p.kv_heads, p.prefix_len, dim}, ScalarType::Float);
  };
  const Tensor sums_k = zeros(wants_prefix_k ? p.prefixes : 0, p.head_dim);
  const Tensor sums_v = zeros(wants_prefix_v ? p.prefixes : 0, p.value_dim);
  const Tensor further_k = zeros(wants_prefix_k ? further : 0, p.head_dim);
  const Tensor further_v = zeros(wants_prefix_v ? further : 0, p.value_dim);
  const auto data = [](const Tensor& tensor, bool wanted) { return wanted ? static_cast<float*>(tensor.data_ptr()) : nullptr; };
  g.dprefix_k = data(sums_k, wants_prefix_k), g.further_k = data(further_k, wants_prefix_k);
  g.dprefix_v = data(sums_v, wants_prefix_v), g.further_v = data(further_v, wants_prefix_v);
  const int64_t parts = int64_t(plan.parts.size());
  in_parallel(p.kv_heads * parts, 2.5 * all_flops(call),
              [&](int64_t begin, int64_t end) { kernels().backward(p, g, plan.parts.data(), parts, begin, end); });
  add_slots(sums_k, further_k, plan.prefix_of_slot), add_slots(sums_v, further_v, plan.prefix_of_slot);
  return {sums_k, sums_v};
}

std::string isa(std::optional<std::string> name) {
  if (name) STD_TORCH_CHECK(use_kernels(name->c_str()), "instruction set: this processor cannot run ", *name);
  return kernels().name;
}

}  // namespace
}  // namespace prefix_kernels

#define TENSORS "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? key_mask, Tensor? bias, "
#define INDICES                                                                                                    \
  "Tensor? key_lens, Tensor? prefix_ids, Tensor? prefix_lens, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? parent, "
#define OPTIONS "bool causal, float scale, int window, float softcap, int first_key_position"

STABLE_TORCH_LIBRARY(prefix_kernels_cpu, m) {
  m.def("forward(" TENSORS INDICES OPTIONS ") -> (Tensor, Tensor)");
  m.def("forward_rows(" TENSORS OPTIONS ") -> Tensor");
  m.def("backward(" TENSORS INDICES OPTIONS
        ", Tensor out, Tensor lse, Tensor dout, Tensor? dlse, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, "
        "bool wants_prefix_k, bool wants_prefix_v) -> (Tensor, Tensor)");
  m.def("isa(str? name=None) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(prefix_kernels_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&prefix_kernels::forward));
  m.impl("forward_rows", TORCH_BOX(&prefix_kernels::forward_rows));
  m.impl("backward", TORCH_BOX(&prefix_kernels::backward));
}

STABLE_TORCH_LIBRARY_IMPL(prefix_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&prefix_kernels::isa));
}
