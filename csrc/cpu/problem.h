// One attention call as plain data. No torch here: kernels see pointers, strides and sizes only.
//
// A batch of rows and packed sequences are the same thing to a kernel: a list of sequences, each with its first query and
// first key. Strides are counted in elements; the last axis (head_dim or value_dim) always has stride 1.
#pragma once

#include <cstdint>

namespace prefix_kernels {

enum class Element : int32_t { float32, bfloat16, float16 };

// A tensor by its strides: element (row, token, head, 0) lies at data + offset(row, token, head).
struct Strided {
  void* data = nullptr;
  Element element = Element::float32;
  int64_t row = 0, token = 0, head = 0;
  int64_t size = 0;  // of the last axis, which kernels see filled up with zeros to whole vectors

  int64_t offset(int64_t row_index, int64_t token_index, int64_t head_index) const {
    return row_index * row + token_index * token + head_index * head;
  }
};

// One row of a batch (first_query = first_key = 0), or one packed sequence (row = 0).
struct Sequence {
  int64_t row, first_query, first_key;
  int64_t q_len, kv_len;  // kv_len: the keys that exist, key_lens[row] where it is given
  int64_t prefix;         // index into the bank, −1 for none
  int64_t prefix_len;     // of this sequence's prefix, 0 for none
  int64_t parent;         // an earlier sequence whose keys this one sees wholly, −1 for none
};

struct Problem {
  Strided q, out;                 // [sequence, token, heads, head_dim or value_dim]
  Strided k, v;                   // [sequence, token, kv_heads, …]
  Strided prefix_k, prefix_v;     // [prefixes, prefix_len, kv_heads, …]
  float* lse = nullptr;           // natural logarithm; null where it is not wanted
  int64_t lse_row = 0, lse_head = 0;  // its strides; queries have stride 1
  const bool* key_mask = nullptr;     // [row, kv_len], true where a key may be attended
  int64_t key_mask_row = 0;
  Strided bias;                       // [row, query, heads, prefix_len + kv_len], strides 0 where it is the same; no data: none
  const Sequence* sequences = nullptr;
  int64_t sequence_count = 0;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  int64_t prefixes = 0, prefix_len = 0;
  bool causal = true;
  double scale = 1.0, softcap = 0.0;   // softcap 0: none
  int64_t window = 0;                  // 0: none
  int64_t first_key_position = -1;     // −1: the prefix is pinned; else the window slides over it

  int64_t group() const { return heads / kv_heads; }
  int64_t lse_offset(const Sequence& s, int64_t query, int64_t head) const {
    return s.row * lse_row + head * lse_head + s.first_query + query;
  }
};

// What the backward pass adds. Gradients that are not wanted have no data.
struct Gradients {
  Strided dout, dq;
  Strided dk, dv;                  // float32, added to
  const float* dlse = nullptr;     // strides of lse; null: zero
  float* dprefix_k = nullptr;      // float32 [prefixes, kv_heads, prefix_len, head_dim], added to
  float* dprefix_v = nullptr;      // float32 [prefixes, kv_heads, prefix_len, value_dim], added to
  float* further_k = nullptr;      // the same of the slots from `prefixes` on
  float* further_v = nullptr;
};

// A share of the sequences whose gradients one task adds up: all have one prefix, and a child is in its parent's part.
struct Part {
  const int64_t* sequences;
  int64_t count;
  int64_t slot;  // where the gradient of their prefix is added up: of a prefix, or one of those that are summed afterwards
};

}  // namespace prefix_kernels
