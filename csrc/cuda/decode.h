// One decoding call as plain data, and its launch. No torch here.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace prefix_kernels::cuda {

constexpr float LOG2_E = 1.4426950408889634f;

// A tensor of 16-bit elements by its strides of a row, a head and a token; the last axis has stride 1.
struct Tokens {
  const void* data;
  int64_t row, head, token;
  bool aligned;  // every token begins at a multiple of 16 bytes
};

// int32 or int64 [n] on the device; null where the call has none.
struct Indices {
  const void* data;
  bool wide;
};

struct DecodeCall {
  Tokens q;                   // [batch, heads, q_len, head_dim]
  Tokens k, v;                // [batch, kv_heads, kv_len, head_dim]
  Tokens prefix_k, prefix_v;  // [prefixes, kv_heads, prefix_len, head_dim]
  void* out;                  // [batch, q_len, heads, head_dim]
  float* lse;                 // [batch, heads, q_len], natural logarithm
  Indices key_lens, prefix_ids, prefix_lens;
  const uint8_t* key_mask;  // [batch, kv_len], 0 hides a key; null: none does
  int64_t key_mask_row;
  int batch, heads, q_len, kv_len, prefixes, prefix_len;
  bool causal;
  int window;   // 0: none
  bool slides;  // the window passes over the prefix too:
  int slide;    // the query at position t sees column p of a prefix of length L if p > L + t + slide
  // Scores, in units of log 2: products · scale, or where softcap is not 0 tanh(products · scale) · softcap.
  float scale, softcap;
  Schedule schedule;
  float* parts;   // part_values(…)
  uint64_t seal;  // no content of memory is this number by chance
};

// Whether the kernel for few queries takes it: it reads 16 bytes at a time.
HOST_DEVICE bool has_few_queries(const DecodeCall& call) {
  return call.schedule.few_warps > 0 && call.q.aligned && call.k.aligned && call.v.aligned && call.prefix_k.aligned &&
         call.prefix_v.aligned;
}

// Whether its rows are cut into equal shares, whose thread blocks put them together themselves.
HOST_DEVICE bool has_shares(const DecodeCall& call) { return has_few_queries(call) && call.schedule.length > 0; }

// Whether its splits can be merged by the thread blocks that have them, where the GPU has clusters of thread blocks.
HOST_DEVICE bool merges_in_clusters(const DecodeCall& call) {
  return has_few_queries(call) && call.schedule.clustered;
}

// Registers, shared memory and code of the kernel that serves a head_dim on the current device.
struct KernelInfo {
  int registers, spilled_bytes, shared_bytes;
  int binary_version;  // 80: compiled for sm_80
  int ptx_version;     // of the virtual architecture that it was compiled from
};

// 0, or an error of the CUDA runtime. A dtype that is not bfloat16 is float16.
int launch_decode(const DecodeCall& call, bool bfloat16, int head_dim, void* stream);
int describe_decode(bool bfloat16, int head_dim, KernelInfo* info);
const char* error_name(int error);

}  // namespace prefix_kernels::cuda
