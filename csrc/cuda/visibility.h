// Which columns a query sees: an interval [first, stop) of its row's own keys and one of its prefix. Both ends grow with the
// query's index. Query i of a row stands at position i + shift.
#pragma once

#include "decode.h"

namespace prefix_kernels::cuda {

struct Range {
  int first, stop;
};

HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }

HOST_DEVICE int clamped(int64_t value, int64_t low, int64_t high) {
  return int(value < low ? low : value > high ? high : value);
}

HOST_DEVICE int64_t index_at(const Indices& indices, int64_t i) {
  return indices.wide ? static_cast<const int64_t*>(indices.data)[i] : static_cast<const int32_t*>(indices.data)[i];
}

// The keys of a row that exist; past them there may lie NaN.
HOST_DEVICE int keys_of(const DecodeCall& call, int row) {
  return call.key_lens.data ? clamped(index_at(call.key_lens, row), 0, call.kv_len) : call.kv_len;
}

// The prefix of a row, −1 for none.
HOST_DEVICE int prefix_of(const DecodeCall& call, int row) {
  if (!call.prefix_ids.data) return 0;
  const int64_t id = index_at(call.prefix_ids, row);
  return id >= 0 && id < call.prefixes ? int(id) : -1;
}

HOST_DEVICE int length_of_prefix(const DecodeCall& call, int prefix) {
  if (prefix < 0) return 0;
  return call.prefix_lens.data ? clamped(index_at(call.prefix_lens, prefix), 0, call.prefix_len) : call.prefix_len;
}

HOST_DEVICE int shift_of(const DecodeCall& call, int keys) { return call.causal ? keys - call.q_len : 0; }

HOST_DEVICE Range keys_seen(const DecodeCall& call, int query, int keys) {
  const int position = query + shift_of(call, keys);
  Range seen{0, call.causal ? clamped(position + 1, 0, keys) : keys};
  if (call.window > 0) {
    seen.first = clamped(int64_t(position) - call.window + 1, 0, keys);
    if (!call.causal) seen.stop = clamped(int64_t(position) + call.window, 0, keys);
  }
  return seen;
}

HOST_DEVICE Range columns_seen(const DecodeCall& call, int query, int keys, int prefix_len) {
  Range seen{0, prefix_len};
  if (call.slides) {
    const int64_t position = query + shift_of(call, keys);
    seen.first = clamped(prefix_len + position + call.slide + 1, 0, prefix_len);
  }
  return seen;
}

}  // namespace prefix_kernels::cuda
