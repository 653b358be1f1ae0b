// The work of one thread block where a row has few queries: each warp reads keys and values from memory into registers, as the
// tensor cores take them, and meets a chunk while the next one is under way. Warps have nothing in common until their last key.
//
//     scoresᵀ [16 keys, 8 queries] = keys · qᵀ        sumsᵀ [DIM, 8 queries] += valuesᵀ · weightsᵀ
//
// A product may meet its 16 dimensions, or keys, in any order that both of its sides have. So lane 4 g + c reads 16 bytes, or
// eight dimensions, at a time: 32 j + 8 c … of the keys g and g + 8 and of query g, 64 h + 8 g … of the values 2 c, 2 c + 1,
// 2 c + 8 and 2 c + 9. It holds scores and sums of the queries 2 c and 2 c + 1.
#pragma once

#include "decode_kernel.h"

namespace prefix_kernels::cuda {

// A thread block has as much of it as its warps need: what it leaves is L1 cache, through which the keys under way come.
template <int DIM>
struct FewShared {
  float2 states[FEW_QUERIES];  // of this thread block: largest, total; its sums are in sums[0]
  float largest[FEW_WARPS][FEW_QUERIES], total[FEW_WARPS][FEW_QUERIES];
  float sums[FEW_WARPS][FEW_QUERIES][DIM + 4];

  static constexpr int64_t bytes(int64_t warps) { return sizeof(FewShared) - (FEW_WARPS - warps) * int64_t(sizeof(sums[0])); }
};

template <int DIM>
struct FewState {
  static constexpr int KEYS = keys_of_few_chunk(DIM), TILES = KEYS / CHUNK;
  uint32_t queries[DIM / 32][4];
  uint32_t keys[TILES][2][DIM / 32][4], values[TILES][4][DIM / 64][4];
  float sums[DIM / 16][4];
  float largest[2], total[2];  // total: over the keys of this thread

  int group, place;            // lane = 4 · group + place

  DEVICE void start() {
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) largest[i] = -INFINITE, total[i] = 0;
  }

  DEVICE void load_query(const uint16_t* from) {
#pragma unroll
    for (int j = 0; j < DIM / 32; ++j) load_once(queries[j], from + 32 * j + place * VECTOR);
  }

  // Keys past the last one are read as that one: hide() takes them out. from: where this lane's first bytes of key 0 are.
  DEVICE void fetch_keys(const unsigned char* from, uint32_t bytes, int first, int last) {
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i) {
      const unsigned char* at = from + uint64_t(uint32_t(least(first + i * 8 + group, last))) * bytes;
#pragma unroll
      for (int j = 0; j < DIM / 32; ++j) load_once(keys[i / 2][i % 2][j], at + 64 * j);
    }
  }
  DEVICE void fetch_values(const unsigned char* from, uint32_t bytes, int first, int last) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) {
      const int value = first + i / 2 * 8 + place * 2 + i % 2;
      const unsigned char* at = from + uint64_t(uint32_t(least(value, last))) * bytes;
#pragma unroll
      for (int h = 0; h < DIM / 64; ++h) load_once(values[i / 4][i % 4][h], at + 128 * h);
    }
  }

  template <typename Element>
  DEVICE void multiply_keys(float (&scores)[TILES][4]) const {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      float odd[4];  // every other step apart: shorter chains of dependent products
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][i] = odd[i] = 0;
#pragma unroll
      for (int j = 0; j < DIM / 32; ++j) {
        const auto &low = keys[t][0][j], &high = keys[t][1][j], &query = queries[j];
        multiply_add<Element>(scores[t], {low[0], high[0], low[1], high[1]}, query[0], query[1]);
        multiply_add<Element>(odd, {low[2], high[2], low[3], high[3]}, query[2], query[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][i] += odd[i];
    }
  }

  template <typename Element>
  DEVICE void add_values(const float (&weights)[TILES][4]) {
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      const uint32_t first = transposed(packed<Element>(weights[t][0], weights[t][1]));
      const uint32_t second = transposed(packed<Element>(weights[t][2], weights[t][3]));
#pragma unroll
      for (int i = 0; i < DIM / 16; ++i) {
        const auto word = [&](int key) { return values[t][key][i / 4][i % 4]; };
        multiply_add<Element>(sums[i], {lower_halves(word(0), word(1)), upper_halves(word(0), word(1)),
                                        lower_halves(word(2), word(3)), upper_halves(word(2), word(3))}, first, second);
      }
    }
  }

  // Products to weights, relative to the largest score of each query so far.
  DEVICE void weigh(float (&scores)[TILES][4]) {
    float now[2];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      now[q] = scores[0][q];
#pragma unroll
      for (int i = 1; i < 2 * TILES; ++i) now[q] = max_of(now[q], scores[i / 2][i % 2 * 2 + q]);
    }
    if (any(now[0] > largest[0] || now[1] > largest[1])) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        for (int mask = 4; mask < LANES; mask *= 2) now[q] = max_of(now[q], shuffle_xor(now[q], mask));
        now[q] = max_of(now[q], largest[q]);
        const float correction = exp2_of(largest[q] - (now[q] == -INFINITE ? 0.0f : now[q]));
        largest[q] = now[q];
        total[q] *= correction;
#pragma unroll
        for (int i = 0; i < DIM / 16; ++i) sums[i][q] *= correction, sums[i][q + 2] *= correction;
      }
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      const float base = largest[q] == -INFINITE ? 0.0f : largest[q];
#pragma unroll
      for (int i = 0; i < 2 * TILES; ++i) {
        float& score = scores[i / 2][i % 2 * 2 + q];
        score = exp2_of(score - base);
        total[q] += score;
      }
    }
  }

  // Scores of the keys from `column` on that a query does not see, or that are not shown.
  DEVICE void hide(float (&scores)[TILES][4], int column, const Range (&seen)[2], unsigned shown) const {
#pragma unroll
    for (int i = 0; i < 2 * TILES; ++i)
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        const int at = column + i * 8 + group;
        if (at < seen[q].first || at >= seen[q].stop || !(shown >> i & 1)) scores[i / 2][i % 2 * 2 + q] = -INFINITE;
      }
  }

  // For the other warps.
  DEVICE void put(FewShared<DIM>& shared, int queries, int warp) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      for (int mask = 4; mask < LANES; mask *= 2) total[q] += shuffle_xor(total[q], mask);
      const int query = place * 2 + q;
      if (query >= queries) continue;
      if (group == 0) shared.largest[warp][query] = largest[q], shared.total[warp][query] = total[q];
#pragma unroll
      for (int i = 0; i < DIM / 16; i += 2) {
        float4* to = reinterpret_cast<float4*>(&shared.sums[warp][query][i / 4 * 64 + group * 8 + i % 4 * 2]);
        *to = float4{sums[i][q], sums[i][q + 2], sums[i + 1][q], sums[i + 1][q + 2]};
      }
    }
  }
};

// The results of a row from the splits of a cluster, which are its thread blocks: up to CLUSTER.
template <typename Element, int DIM, int CLUSTER>
DEVICE void merge_cluster(const DecodeCall& call, FewShared<DIM>& shared, const Item& item) {
  const Schedule& s = call.schedule;
  sync_cluster();
  for (int i = thread_index(); i * s.splits + item.split < s.unit_queries * (DIM / 4); i += threads_of_block()) {
    const int index = i * s.splits + item.split, query = index / (DIM / 4), dim = index % (DIM / 4) * 4;
    float largest = -INFINITE, total = 0;
    float2 states[CLUSTER];
#pragma unroll
    for (int j = 0; j < CLUSTER; ++j) {
      states[j] = float2{-INFINITE, 0};
      if (j < s.splits) states[j] = load_in_cluster(&shared.states[query], j);
      largest = max_of(largest, states[j].x);
    }
    const float base = largest == -INFINITE ? 0.0f : largest;
    float4 sums{0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < CLUSTER; ++j) {
      if (j >= s.splits) break;
      const float weight = exp2_of(states[j].x - base);
      total += weight * states[j].y;
      sums = plus(sums, weight, load_in_cluster(reinterpret_cast<const float4*>(&shared.sums[0][query][dim]), j));
    }
    const Query at = query_of(call, item.index, item.kv_head, query);
    store_out<Element, DIM>(call, at, dim, sums, total);
    if (dim == 0) store_lse(call, at, largest, total);
  }
  sync_cluster();  // until then others may read this block's shared memory
}

// One thread block's part of an item: with SHARES the chunks of `part`, else a split. clustered: the splits of a row are a cluster.
template <typename Element, int DIM, bool SHARES>
DEVICE void decode_row(const DecodeCall& call, FewShared<DIM>& shared, Item item, Share part, bool clustered) {
  using State = FewState<DIM>;
  constexpr int KEYS = State::KEYS;
  const Schedule& s = call.schedule;
  const unsigned thread = thread_index(), lane = thread % LANES;
  const int warp = thread / LANES, warps = threads_of_block() / LANES;
  const int row = item.index, own_keys = keys_of(call, row);
  const int prefix = prefix_of(call, row), prefix_len = length_of_prefix(call, prefix);

  // Chunks of the prefix, then of the row's own keys: from the first column that a query sees.
  const Range prefix_columns{call.slides ? columns_seen(call, 0, own_keys, prefix_len).first : 0, prefix_len};
  Range own_columns{0, own_keys};
  if (call.window > 0) own_columns = keys_of_unit(call, row, own_keys);
  const int prefix_chunks = blocks_of(prefix_columns, KEYS), chunks = prefix_chunks + blocks_of(own_columns, KEYS);
  Share share = part;
  if constexpr (!SHARES)
    share = share_of(chunks, s.by_splits, item.split);
  else if (chunks != s.length)  // the same share of what is there
    share = {part.begin * chunks / s.by_length, part.end * chunks / s.by_length};
  State state;
  state.group = lane / 4, state.place = lane % 4;
  struct {
    const unsigned char *keys, *values;
    uint32_t key_bytes, value_bytes;  // from one to the next
    int last, column;                 // column: of chunk 0, if all chunks were of this kind
  } from;
  const auto turn_to = [&](bool own) {
    const Tokens &k = own ? call.k : call.prefix_k, &v = own ? call.v : call.prefix_v;
    const auto* keys = start_of(k, own ? row : prefix, item.kv_head) + state.place * VECTOR;
    const auto* values = start_of(v, own ? row : prefix, item.kv_head) + state.group * VECTOR;
    from = {reinterpret_cast<const unsigned char*>(keys), reinterpret_cast<const unsigned char*>(values),
            2 * uint32_t(k.token), 2 * uint32_t(v.token), (own ? own_keys : prefix_len) - 1,
            own ? own_columns.first - prefix_chunks * KEYS : prefix_columns.first};
  };
  const uint8_t* mask = call.key_mask ? call.key_mask + row * call.key_mask_row : nullptr;
  unsigned shown = ~0u;  // bit i: the chunk's key 8 i + group
  const auto fetch_keys = [&](int chunk) {
    const int first = from.column + chunk * KEYS;
    state.fetch_keys(from.keys, from.key_bytes, first, from.last);
    if (mask && chunk >= prefix_chunks) {
      shown = 0;
#pragma unroll
      for (int i = 0; i < KEYS / 8; ++i) {
        const int key = first + i * 8 + state.group;
        if (key < own_keys && mask[key]) shown |= 1u << i;
      }
    }
  };
  const auto fetch_values = [&](int chunk) {
    state.fetch_values(from.values, from.value_bytes, from.column + chunk * KEYS, from.last);
  };

  int chunk = share.begin + warp;
  turn_to(chunk >= prefix_chunks);
  if (chunk < share.end) fetch_keys(chunk), fetch_values(chunk);
  state.start();
  {
    const Query at = query_of(call, row, item.kv_head, state.group < s.unit_queries ? state.group : 0);
    state.load_query(start_of(call.q, at.row, at.head) + at.query * call.q.token);
  }
  int queries[2];
  Range seen[2];
  const auto look = [&](bool own) {
#pragma unroll
    for (int q = 0; q < 2; ++q)
      seen[q] = own ? keys_seen(call, queries[q], own_keys) : columns_seen(call, queries[q], own_keys, prefix_len);
  };
#pragma unroll
  for (int q = 0; q < 2; ++q) {  // one that does not exist sees what the last one does
    const int number = state.place * 2 + q;
    queries[q] = (number < s.unit_queries ? number : s.unit_queries - 1) / s.by_group;
  }
  look(chunk >= prefix_chunks);

#pragma unroll 1
  for (; chunk < share.end; chunk += warps) {
    const int next = chunk + warps, column = from.column + chunk * KEYS;
    const unsigned shown_now = shown;
    float scores[State::TILES][4];
    state.template multiply_keys<Element>(scores);
    const bool turns = chunk < prefix_chunks && next >= prefix_chunks;
    if (turns) turn_to(true);
    if (next < share.end) fetch_keys(next);
#pragma unroll
    for (int i = 0; i < 4 * State::TILES; ++i) scores[i / 4][i % 4] *= call.scale;
    if (call.softcap > 0) {
#pragma unroll
      for (int i = 0; i < 4 * State::TILES; ++i) scores[i / 4][i % 4] = tanh_of(scores[i / 4][i % 4]) * call.softcap;
    }
    bool edge = shown_now != ~0u;
#pragma unroll
    for (int q = 0; q < 2; ++q) edge = edge || seen[q].first > column || seen[q].stop < column + KEYS;
    if (any(edge)) state.hide(scores, column, seen, shown_now);
    state.weigh(scores);
    state.template add_values<Element>(scores);
    if (next < share.end) fetch_values(next);
    if (turns) look(true);
  }

  state.put(shared, s.unit_queries, warp);
  const bool stores = SHARES ? part.begin == 0 : !s.merges();
  Holders holders{0, 1};
  if constexpr (SHARES) {
    holders = holders_of(s, row * s.kv_heads + item.kv_head);
    item.split = s.blocks - 1 - block_index() - holders.first;
    for (int i = thread + 1; stores && i < holders.count; i += threads_of_block())
      take_seal(parts_of<DIM>(call).seals + block_index() - i, call.seal);
  }
  sync_threads();
  for (int index = thread_index(); index < s.unit_queries * (DIM / 4); index += threads_of_block()) {
    const int query = index / (DIM / 4), dim = index % (DIM / 4) * 4;
    float largest = -INFINITE, total = 0;
#pragma unroll 4
    for (int w = 0; w < warps; ++w) largest = max_of(largest, shared.largest[w][query]);
    const float base = largest == -INFINITE ? 0.0f : largest;
    float4 sums{0, 0, 0, 0};
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const float weight = exp2_of(shared.largest[w][query] - base);
      total += weight * shared.total[w][query];
      sums = plus(sums, weight, *reinterpret_cast<const float4*>(&shared.sums[w][query][dim]));
    }
    if (clustered) {
      *reinterpret_cast<float4*>(&shared.sums[0][query][dim]) = sums;
      if (dim == 0) shared.states[query] = float2{largest, total};
      continue;
    }
#pragma unroll 4
    for (int i = 1; SHARES && stores && i < holders.count; ++i)
      add_part<DIM>(parts_of<DIM>(call), s.place(i, item.kv_head, row, query), dim, sums, largest, total);
    const Query at = query_of(call, row, item.kv_head, query);
    store_sums<Element, DIM>(call, at, stores, item.split, item.kv_head, row, query, dim, sums, largest, total);
  }
  if (clustered && s.splits > FEW_CLUSTER)
    merge_cluster<Element, DIM, LARGE_CLUSTER>(call, shared, item);
  else if (clustered)
    merge_cluster<Element, DIM, FEW_CLUSTER>(call, shared, item);
  if constexpr (SHARES) {
    sync_threads();  // the next part takes the place of this one's sums
    if (!stores && thread == 0) put_seal(parts_of<DIM>(call).seals + block_index(), call.seal);
  }
}

// A split of a row, a thread block's.
template <typename Element, int DIM>
DEVICE void decode_few(const DecodeCall& call, FewShared<DIM>& shared, bool clustered) {
  let_next_kernel_start();
  const Schedule& s = call.schedule;
  decode_row<Element, DIM, false>(call, shared, row_item_of(s, block_index()), {0, 0}, clustered);
}

// An equal share of all rows in a row. Shares are counted from the last thread block to the first: an item that ends in another one
// than it begins in is put together where it begins, by a thread block that starts after those who have its other parts. They met
// these first, and wait for nobody before that. (Decoupled look-back, Merrill and Garland 2016, relies on the same order.)
template <typename Element, int DIM>
DEVICE void decode_share(const DecodeCall& call, FewShared<DIM>& shared) {
  let_next_kernel_start();
  const Schedule& s = call.schedule;
  const int first = (s.blocks - 1 - block_index()) * int(s.by_share.by);
  const int stop = least(first + int(s.by_share.by), s.units * s.kv_heads * s.length);
#pragma unroll 1
  for (int at = first; at < stop;) {
    const int number = at / s.by_length, begin = at - number * s.length, end = least(s.length, begin + stop - at);
    at += end - begin;
    decode_row<Element, DIM, true>(call, shared, {false, number % s.by_kv_heads, 0, number / s.by_kv_heads}, {begin, end}, false);
  }
}

}  // namespace prefix_kernels::cuda
