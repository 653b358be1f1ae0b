// The work of one thread block: its queries meet their share of prefix and keys, then the result is stored, or a part of it.
//
// Blocks of keys and values come by asynchronous copies; while one is met the next is under way. The warps stand side by side
// along the queries, as many as these fill, and share the keys of a block among the others.
#pragma once

#include "merge.h"

namespace prefix_kernels::cuda {

DEVICE const uint16_t* start_of(const Tokens& tokens, int64_t row, int64_t head) {
  return static_cast<const uint16_t*>(tokens.data) + row * tokens.row + head * tokens.head;
}

// Two elements that may lie at an odd address.
DEVICE uint32_t pair_at(const uint16_t* from) { return from[0] | uint32_t(from[1]) << 16; }

// [KEYS, DIM] from token `first` on, zeros from `exists` on. from: the row's token 0.
template <int DIM>
DEVICE void copy_tokens(uint16_t (&to)[TileSizes<DIM>::KEYS][TileSizes<DIM>::PITCH], const uint16_t* from, int stride,
                        bool aligned, int first, int exists) {
  using Sizes = TileSizes<DIM>;
  constexpr int TOKENS = THREADS / Sizes::COPIERS, COPIES = Sizes::KEYS / TOKENS;  // at a time; one after the other
  const unsigned thread = thread_index(), vector = thread % Sizes::COPIERS, token = thread / Sizes::COPIERS;
  if (vector >= Sizes::VECTORS) return;
  const uint16_t* source = from + int64_t(first + int(token)) * stride + vector * VECTOR;
  uint16_t* target = &to[token][vector * VECTOR];
  const int left = exists - first - int(token);
  const int64_t step = int64_t(TOKENS) * stride;
  if (aligned) {
#pragma unroll
    for (int i = 0; i < COPIES; ++i, source += step, target += TOKENS * Sizes::PITCH)
      copy_async(target, i * TOKENS < left ? source : from, i * TOKENS < left);
  } else {
#pragma unroll 1
    for (int i = 0; i < COPIES; ++i, source += step, target += TOKENS * Sizes::PITCH) {
      uint4 words{0, 0, 0, 0};
      if (i * TOKENS < left)
        words = {pair_at(source), pair_at(source + 2), pair_at(source + 4), pair_at(source + 6)};
      *reinterpret_cast<uint4*>(target) = words;
    }
  }
}

// Fragments of 16 queries; those that do not exist have the numbers of the first one.
template <int DIM>
DEVICE void load_queries(WarpState<DIM>& state, const Tokens& q, const Query (&queries)[2], int lane) {
  const uint16_t* from[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    from[r] = start_of(q, queries[r].row, queries[r].head) + queries[r].query * q.token + lane % 4 * 2;
  const auto load = [&](auto pair) {
#pragma unroll
    for (int step = 0; step < DIM / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) state.queries[step][i] = pair(from[i % 2] + step * 16 + i / 2 * 8);
  };
  if (q.aligned)
    load([](const uint16_t* at) { return *reinterpret_cast<const uint32_t*>(at); });
  else
    load(pair_at);
}

// Bit i: whether the key mask shows key i of a block. Each lane reads two bytes, a block before they are needed.
struct MaskOfBlock {
  const uint8_t* mask;  // of the row; null: every key is shown
  int exists;
  int low, high;

  DEVICE void read(int first, int lane) {
    if (!mask) return;
    low = first + lane < exists ? mask[first + lane] : 0;
    high = first + LANES + lane < exists ? mask[first + LANES + lane] : 0;
  }
  DEVICE uint64_t bits() const {
    if (!mask) return ~uint64_t(0);
    return ballot(low != 0) | uint64_t(ballot(high != 0)) << LANES;
  }
};

// The prefix columns that any query of the tile sees. All lanes of a warp.
template <int DIM>
DEVICE Range columns_of_tile(const DecodeCall& call, const Tile& tile, const SharedMemory<DIM>& shared, int lane) {
  int lowest = tile.prefix_len;
  if (call.slides) {
    for (int i = lane; i < tile.count; i += LANES) {
      const Query first = query_of(call, tile.unit(i, shared), 0, 0);
      const int seen = columns_seen(call, first.query, keys_of(call, first.row), tile.prefix_len).first;
      lowest = seen < lowest ? seen : lowest;
    }
    for (int mask = 1; mask < LANES; mask *= 2) {
      const int other = shuffle_xor(lowest, mask);
      lowest = other < lowest ? other : lowest;
    }
  } else {
    lowest = 0;
  }
  return {lowest, tile.prefix_len};
}

// The keys that any query of a row item sees.
DEVICE Range keys_of_unit(const DecodeCall& call, int unit, int exists) {
  const Schedule& s = call.schedule;
  const int first = unit % s.by_row_units * s.unit_queries, left = s.row_queries - first;
  const int last = first + (left < s.unit_queries ? left : s.unit_queries) - 1;
  return {keys_seen(call, first / s.by_group, exists).first, keys_seen(call, last / s.by_group, exists).stop};
}

DEVICE int blocks_of(Range columns, int keys) {
  return columns.stop > columns.first ? (columns.stop - columns.first + keys - 1) / keys : 0;
}

template <typename Element, int DIM>
DEVICE void decode_item(const DecodeCall& call, SharedMemory<DIM>& shared) {
  constexpr int KEYS = TileSizes<DIM>::KEYS, STAGES = TileSizes<DIM>::STAGES;
  let_next_kernel_start();
  const Schedule& s = call.schedule;
  const Item item = item_of(s, block_index());
  const int warp = thread_index() / LANES, lane = thread_index() % LANES;
  const Tile tile = tile_of(call, item, shared);
  if (tile.count == 0) return;
  const int query_warps = item.shared ? s.shared_warps : s.row_warps;
  const int query_warp = warp % query_warps, key_warp = warp / query_warps;

  // Blocks of the prefix, then, in a row item, of the row's own keys: from the first column that the tile sees.
  const int row = tile.first / s.by_row_units, own_keys = item.shared ? 0 : keys_of(call, row);
  const Range prefix_columns = columns_of_tile(call, tile, shared, lane);
  const Range own_columns = item.shared ? Range{0, 0} : keys_of_unit(call, tile.first, own_keys);
  const int prefix_blocks = blocks_of(prefix_columns, KEYS), blocks = prefix_blocks + blocks_of(own_columns, KEYS);
  const Share share = share_of(blocks, item.shared ? s.by_shared_splits : s.by_splits, item.split);
  const auto first_column = [&](int block) {
    return block < prefix_blocks ? prefix_columns.first + block * KEYS : own_columns.first + (block - prefix_blocks) * KEYS;
  };
  const auto fetch = [&](int block) {
    if (block < share.end) {
      const bool of_prefix = block < prefix_blocks;
      const Tokens &k = of_prefix ? call.prefix_k : call.k, &v = of_prefix ? call.prefix_v : call.v;
      const int from = of_prefix ? tile.prefix : row, exists = of_prefix ? tile.prefix_len : own_keys;
      auto& to = shared.blocks[(block - share.begin) % STAGES];
      copy_tokens<DIM>(to.keys, start_of(k, from, item.kv_head), int(k.token), k.aligned, first_column(block), exists);
      copy_tokens<DIM>(to.values, start_of(v, from, item.kv_head), int(v.token), v.aligned, first_column(block), exists);
    }
    commit_copies();  // an empty group where there is no block: wait_for_copies counts groups
  };
#pragma unroll 1
  for (int stage = 0; stage < STAGES; ++stage) fetch(share.begin + stage);

  WarpState<DIM> state;
  state.start();
  Range seen[2];       // of the blocks that are met now; what does not exist sees everything
  int own_queries[2];  // their places in the row
  bool active = false;
  {
    Query queries[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Query at = query_of_slot(call, tile, shared, item.kv_head, query_warp * WARP_QUERIES + lane / 4 + 8 * r);
      seen[r] = {0, tile.prefix_len};
      if (at.exists && call.slides) seen[r] = columns_seen(call, at.query, keys_of(call, at.row), tile.prefix_len);
      own_queries[r] = at.exists ? at.query : call.q_len - 1;
      active = active || at.exists;
      queries[r] = at;
    }
    active = any(active);
    load_queries(state, call.q, queries, lane);
  }
  const auto look_at_keys = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) seen[r] = keys_seen(call, own_queries[r], own_keys);
  };
  if (share.begin > prefix_blocks) look_at_keys();
  MaskOfBlock mask{nullptr, own_keys, 0, 0};
  if (!item.shared && call.key_mask) mask.mask = call.key_mask + row * call.key_mask_row;
  if (share.begin >= prefix_blocks) mask.read(first_column(share.begin), lane);

#pragma unroll 1
  for (int block = share.begin; block < share.end; ++block) {
    if (block == prefix_blocks) look_at_keys();
    const uint64_t shown = block < prefix_blocks ? ~uint64_t(0) : mask.bits();
    if (block + 1 >= prefix_blocks) mask.read(first_column(block + 1), lane);
    wait_for_copies<STAGES - 1>();
    sync_threads();
    if (active) {
      const auto& from = shared.blocks[(block - share.begin) % STAGES];
#pragma unroll 1
      for (int key = key_warp * CHUNK; key < KEYS; key += WARPS / query_warps * CHUNK)
        state.template attend<Element>(from.keys[key], from.values[key], first_column(block) + key, seen,
                                       int(shown >> key) & EVERY_KEY, call, lane);
    }
    if (block + STAGES < share.end) sync_threads();  // it takes the place of this block
    fetch(block + STAGES);
  }
  gather_warps(state, shared, query_warps);
  store_item<Element>(call, item, tile, shared, query_warps);
}

}  // namespace prefix_kernels::cuda
