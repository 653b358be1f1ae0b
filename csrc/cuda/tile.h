// What a thread block has in shared memory, and which queries are its own.
#pragma once

#include "visibility.h"

namespace prefix_kernels::cuda {

template <int DIM>
struct alignas(16) SharedMemory {
  using Sizes = TileSizes<DIM>;
  struct Block {
    uint16_t keys[Sizes::KEYS][Sizes::PITCH], values[Sizes::KEYS][Sizes::PITCH];
  };
  union {
    Block blocks[Sizes::STAGES];
    float sums[WARPS][WARP_QUERIES][Sizes::SUM_PITCH];  // of each warp, after its last key
    int rows_of_prefix[MAX_GROUPED_PREFIXES];           // before the first key
  };
  float largest[WARPS][WARP_QUERIES], total[WARPS][WARP_QUERIES];
  float slot_largest[MAX_SLOTS], slot_total[MAX_SLOTS];  // of a query over all warps
  int units[MAX_SLOTS];
  int prefix, unit_count;
};

// The units whose queries a thread block has, one behind the other; all have one prefix.
struct Tile {
  bool listed;  // in shared memory; else: first, first + 1, …
  int first, count;
  int prefix, prefix_len;  // prefix_len 0: none is read
  template <int DIM>
  DEVICE int unit(int i, const SharedMemory<DIM>& shared) const {
    return listed ? shared.units[i] : first + i;
  }
};

struct Query {
  bool exists;
  int row, query, head;
};

// Query `index` of a unit.
DEVICE Query query_of(const DecodeCall& call, int unit, int kv_head, int index) {
  const Schedule& s = call.schedule;
  const int number = unit % s.by_row_units * s.unit_queries + index;
  return {number < s.row_queries, unit / s.by_row_units, number / s.by_group,
          kv_head * int(s.by_group.by) + number % s.by_group};
}

// One that does not exist has the place of the first one.
template <int DIM>
DEVICE Query query_of_slot(const DecodeCall& call, const Tile& tile, const SharedMemory<DIM>& shared, int kv_head, int slot) {
  const int i = slot / call.schedule.by_unit_queries;
  if (i < tile.count) {
    const Query at = query_of(call, tile.unit(i, shared), kv_head, slot % call.schedule.by_unit_queries);
    if (at.exists) return at;
  }
  return {false, 0, 0, 0};
}

// The tile of a shared item, of a bank: the rows of each prefix in order, cut into tiles, prefix by prefix. All threads.
template <int DIM>
DEVICE Tile grouped_tile(const DecodeCall& call, int tile, SharedMemory<DIM>& shared) {
  const Schedule& s = call.schedule;
  const int thread = thread_index(), lane = thread % LANES;
  for (int p = thread; p < call.prefixes; p += THREADS) shared.rows_of_prefix[p] = 0;
  if (thread == 0) shared.prefix = -1, shared.unit_count = 0;
  sync_threads();
  for (int row = thread; row < call.batch; row += THREADS) {
    const int prefix = prefix_of(call, row);
    if (length_of_prefix(call, prefix) > 0) add_one_shared(&shared.rows_of_prefix[prefix]);
  }
  sync_threads();
  if (thread < LANES) {
    int before = 0, chosen = -1, local = 0;  // tiles of the prefixes passed; the prefix found; the tile among its own
    for (int base = 0; base < call.prefixes && chosen < 0; base += LANES) {
      const int p = base + lane, rows = p < call.prefixes ? shared.rows_of_prefix[p] : 0;
      const int own = int(ceil_div(int64_t(rows) * s.row_units, s.tile_units));
      int upto = own;
      for (int distance = 1; distance < LANES; distance *= 2) {
        const int other = shuffle_up(upto, distance);
        if (lane >= distance) upto += other;
      }
      const bool here = before + upto - own <= tile && tile < before + upto;
      const unsigned found = ballot(here);
      if (found) {
        int winner = 0;
        while (!(found >> winner & 1)) ++winner;
        chosen = base + winner;
        local = shuffle(tile - (before + upto - own), winner);
      }
      before += shuffle(upto, LANES - 1);
    }
    if (chosen >= 0) {
      const int first_unit = local * s.tile_units;
      int rank = 0;  // of the row among those of the prefix
      for (int base = 0; base < call.batch; base += LANES) {
        const int row = base + lane;
        const bool mine = row < call.batch && prefix_of(call, row) == chosen;
        const unsigned same = ballot(mine);
        const int unit = (rank + count_bits(same & ((1u << lane) - 1))) * s.row_units;
        for (int i = 0; mine && i < s.row_units; ++i) {
          const int place = unit + i - first_unit;
          if (place >= 0 && place < s.tile_units) shared.units[place] = row * s.row_units + i;
        }
        rank += count_bits(same);
      }
      if (lane == 0) {
        const int left = rank * s.row_units - first_unit;
        shared.prefix = chosen, shared.unit_count = left < s.tile_units ? left : s.tile_units;
      }
    }
  }
  sync_threads();
  return {true, 0, shared.unit_count, shared.prefix, length_of_prefix(call, shared.prefix)};
}

template <int DIM>
DEVICE Tile tile_of(const DecodeCall& call, const Item& item, SharedMemory<DIM>& shared) {
  const Schedule& s = call.schedule;
  if (!item.shared) {
    const int prefix = s.shared_splits > 0 ? -1 : prefix_of(call, item.index / s.by_row_units);
    return {false, item.index, 1, prefix, length_of_prefix(call, prefix)};
  }
  if (call.prefix_ids.data) return grouped_tile(call, item.index, shared);
  const int first = item.index * s.tile_units, left = s.units - first;
  return {false, first, left < s.tile_units ? left : s.tile_units, 0, call.prefix_len};
}

}  // namespace prefix_kernels::cuda
