// From the state of an item's warps to a result, or to a partial one, which a second kernel merges with those of other splits.
//
//     lse = largest + log total        out = sums / total        over splits in their order
#pragma once

#include "softmax.h"
#include "tile.h"

namespace prefix_kernels::cuda {

constexpr int LOADS_AHEAD = 8;  // of partial results, to have several under way

struct Parts {
  float* sums;      // [places, DIM]
  float2* states;   // [places]: largest, total
  uint64_t* seals;  // [thread blocks]: DecodeCall.seal while a part of this one lies there for another one
};

template <int DIM>
DEVICE Parts parts_of(const DecodeCall& call) {
  auto* states = reinterpret_cast<float2*>(call.parts + call.schedule.places() * DIM);
  return {call.parts, states, reinterpret_cast<uint64_t*>(states + call.schedule.places())};
}

DEVICE float4 plus(float4 a, float weight, float4 b) {
  a.x += weight * b.x, a.y += weight * b.y, a.z += weight * b.z, a.w += weight * b.w;
  return a;
}

// Four dimensions of a query's sums, its largest score and its total, of which a part lies at a place too: both together.
template <int DIM>
DEVICE void add_part(const Parts& parts, int64_t place, int dim, float4& sums, float& largest, float& total) {
  float4 part = load_written(reinterpret_cast<const float4*>(parts.sums + place * DIM + dim));
  const float2 state = load_written(parts.states + place);
  if (state.y == 0) part = float4{0, 0, 0, 0};  // a split that saw nothing left no sums
  const float now = max_of(largest, state.x), base = now == -INFINITE ? 0.0f : now;
  const float before = exp2_of(largest - base), of_part = exp2_of(state.x - base);
  sums = plus(plus(float4{0, 0, 0, 0}, before, sums), of_part, part);
  total = total * before + state.y * of_part, largest = now;
}

// Four dimensions of one query's output.
template <typename Element, int DIM>
DEVICE void store_out(const DecodeCall& call, const Query& at, int dim, float4 sums, float total) {
  const float inverse = total == 0 ? 0.0f : 1 / total;
  const int64_t token = (int64_t(at.row) * call.q_len + at.query) * call.heads + at.head;
  uint2 words{packed<Element>(sums.x * inverse, sums.y * inverse), packed<Element>(sums.z * inverse, sums.w * inverse)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(call.out) + token * DIM + dim) = words;
}

DEVICE void store_lse(const DecodeCall& call, const Query& at, float largest, float total) {
  call.lse[(int64_t(at.row) * call.heads + at.head) * call.q_len + at.query] = (largest + log2_of(total)) * LN_2;
}

// The warps' states into shared memory: each query's largest and total over the key groups, sums scaled to that largest.
template <int DIM>
DEVICE void gather_warps(WarpState<DIM>& state, SharedMemory<DIM>& shared, int query_warps) {
  const int thread = thread_index(), warp = thread / LANES, lane = thread % LANES;
  state.finish();
  sync_threads();  // sums take the place of keys and values
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (lane % 4 == 0) {
      shared.largest[warp][lane / 4 + 8 * r] = state.largest[r];
      shared.total[warp][lane / 4 + 8 * r] = state.total[r];
    }
  sync_threads();
  const auto largest_of = [&](int query_warp, int row) {
    float largest = -INFINITE;
    for (int w = query_warp; w < WARPS; w += query_warps) largest = max_of(largest, shared.largest[w][row]);
    return largest;
  };
  if (thread < query_warps * WARP_QUERIES) {
    const int query_warp = thread / WARP_QUERIES, row = thread % WARP_QUERIES;
    const float largest = largest_of(query_warp, row), base = largest == -INFINITE ? 0.0f : largest;
    float total = 0;
    for (int w = query_warp; w < WARPS; w += query_warps) total += shared.total[w][row] * exp2_of(shared.largest[w][row] - base);
    shared.slot_largest[thread] = largest, shared.slot_total[thread] = total;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = lane / 4 + 8 * r;
    const float largest = largest_of(warp % query_warps, row);
    const float weight = exp2_of(state.largest[r] - (largest == -INFINITE ? 0.0f : largest));
#pragma unroll
    for (int i = 0; i < DIM / 8; ++i) {
      float2 pair{state.sums[i][2 * r] * weight, state.sums[i][2 * r + 1] * weight};
      *reinterpret_cast<float2*>(&shared.sums[warp][row][i * 8 + lane % 4 * 2]) = pair;
    }
  }
  sync_threads();
}

// Four dimensions of one query of an item, and at the first ones its largest and total: the result, where this item is the only
// one of its unit, else a partial result. split: among all, shared ones first.
template <typename Element, int DIM>
DEVICE void store_sums(const DecodeCall& call, const Query& at, bool alone, int split, int kv_head, int unit, int number, int dim,
                       float4 sums, float largest, float total) {
  const Schedule& s = call.schedule;
  if (alone) {
    store_out<Element, DIM>(call, at, dim, sums, total);
    if (dim == 0) store_lse(call, at, largest, total);
  } else {
    const Parts parts = parts_of<DIM>(call);
    const int64_t place = s.place(split, kv_head, unit, number);
    if (total != 0) *reinterpret_cast<float4*>(parts.sums + place * DIM + dim) = sums;
    if (dim == 0) parts.states[place] = float2{largest, total};
  }
}

// What gather_warps left.
template <typename Element, int DIM>
DEVICE void store_item(const DecodeCall& call, const Item& item, const Tile& tile, const SharedMemory<DIM>& shared,
                       int query_warps) {
  const Schedule& s = call.schedule;
  const int slots = tile.count * s.unit_queries;
  for (int index = thread_index(); index < slots * (DIM / 4); index += THREADS) {
    const int slot = index / (DIM / 4), dim = index % (DIM / 4) * 4;
    const int unit = tile.unit(slot / s.by_unit_queries, shared), number = slot % s.by_unit_queries;
    const Query at = query_of(call, unit, item.kv_head, number);
    if (!at.exists) continue;
    float4 sums{0, 0, 0, 0};
    for (int w = slot / WARP_QUERIES; w < WARPS; w += query_warps)
      sums = plus(sums, 1, *reinterpret_cast<const float4*>(&shared.sums[w][slot % WARP_QUERIES][dim]));
    const int split = item.shared ? item.split : s.shared_splits + item.split;
    store_sums<Element, DIM>(call, at, !s.merges(), split, item.kv_head, unit, number, dim, sums, shared.slot_largest[slot],
                             shared.slot_total[slot]);
  }
}

// out and lse of one query from its partial results. All lanes of a warp, four dimensions each.
template <typename Element, int DIM>
DEVICE void merge_query(const DecodeCall& call, const Query& at, int64_t place, int first_split, int splits) {
  const Schedule& s = call.schedule;
  const Parts parts = parts_of<DIM>(call);
  const int lane = thread_index() % LANES;
  const int64_t step = s.place(1, 0, 0, 0);
  constexpr int VECTORS = DIM / 4, ROUNDS = (VECTORS + LANES - 1) / LANES;
  float largest = -INFINITE;
  for (int j = first_split + lane; j < splits; j += LANES)
    largest = max_of(largest, load_written(parts.states + place + j * step).x);
  for (int mask = 1; mask < LANES; mask *= 2) largest = max_of(largest, shuffle_xor(largest, mask));
  const float base = largest == -INFINITE ? 0.0f : largest;
  float total = 0;
  float4 sums[ROUNDS];
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) sums[i] = float4{0, 0, 0, 0};
  for (int from = first_split; from < splits; from += LANES) {
    float weight = 0;
    if (from + lane < splits) {
      const float2 state = load_written(parts.states + place + (from + lane) * step);
      weight = exp2_of(state.x - base);
      total += weight * state.y;
    }
    const int here = splits - from < LANES ? splits - from : LANES;
    for (int first = 0; first < here; first += LOADS_AHEAD) {
      float4 ahead[LOADS_AHEAD][ROUNDS];
      float weights[LOADS_AHEAD];
#pragma unroll
      for (int j = 0; j < LOADS_AHEAD; ++j) {
        weights[j] = shuffle(weight, (first + j) % LANES);
        const float4* part = reinterpret_cast<const float4*>(parts.sums + (place + (from + first + j) * step) * DIM);
        const bool there = first + j < here && weights[j] != 0;  // a split that saw nothing left no sums
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
          ahead[j][i] = float4{0, 0, 0, 0};
          if (there && lane + i * LANES < VECTORS) ahead[j][i] = load_written(part + lane + i * LANES);
        }
      }
#pragma unroll
      for (int j = 0; j < LOADS_AHEAD; ++j)
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) sums[i] = plus(sums[i], weights[j], ahead[j][i]);
    }
  }
  for (int mask = 1; mask < LANES; mask *= 2) total += shuffle_xor(total, mask);
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i)
    if (lane + i * LANES < VECTORS) store_out<Element, DIM>(call, at, (lane + i * LANES) * 4, sums[i], total);
  if (lane == 0) store_lse(call, at, largest, total);
}

// A warp of the second kernel: the results of one query of one unit.
template <typename Element, int DIM>
DEVICE void merge_item(const DecodeCall& call) {
  const Schedule& s = call.schedule;
  const int number = block_index() * WARPS + thread_index() / LANES;
  wait_for_kernel_before();
  if (number >= s.merged_queries()) return;
  const int slot = number / s.by_unit_queries, query = number % s.by_unit_queries;
  const int kv_head = slot / s.by_units, unit = slot % s.by_units;
  const Query at = query_of(call, unit, kv_head, query);
  if (!at.exists) return;
  // Of a row that has no prefix nobody left a part of it.
  const bool lacks_prefix = call.prefix_ids.data && length_of_prefix(call, prefix_of(call, at.row)) == 0;
  merge_query<Element, DIM>(call, at, s.place(0, kv_head, unit, query), lacks_prefix ? s.shared_splits : 0,
                            s.shared_splits + s.splits);
}

}  // namespace prefix_kernels::cuda
