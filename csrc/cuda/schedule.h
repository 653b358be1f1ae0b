// How a decoding call is cut into the items of thread blocks, and where their partial results lie. Plain C++: it depends on
// sizes alone, and what depends on values (fill, prefixes of a bank) is cut again on the device, by share_of.
//
//     unit          up to 64 queries of one row and one kv head: what is merged at a time
//     shared item   a tile of units that have one prefix × a split of that prefix
//     row item      a unit × a split of its own keys; where nothing is shared, of its prefix and its keys in a row
#pragma once

#include <algorithm>
#include <cstdint>

#include "tile_sizes.h"

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ inline
#else
#define HOST_DEVICE inline
#endif

namespace prefix_kernels::cuda {

// Measured on an H200 with heads of 64 and 128, against half and twice as much or (SHORT_ROW, SHORT_PREFIX) more. READ_AGAIN
// follows from the bandwidths measured there; CACHED, MAX_SPLITS and MAX_GROUPED_PREFIXES are assumed.
constexpr int64_t SHORT_PREFIX = 64;           // columns that a row's own item reads sooner than others help
constexpr int64_t READ_AGAIN = 48 << 20;       // bytes of a prefix, for every row anew, that few queries read sooner from a cache
constexpr int64_t CACHED = 24 << 20;           // bytes of a prefix that stay in the L2 cache beside the rows' own keys
constexpr int64_t SHORT_ROW = 256;             // columns of an item that is not worth a split and a merge
constexpr int64_t LONG_BLOCK = 2048;           // columns of a thread block that are worth more of them, and a second kernel
constexpr int64_t LEAST_COLUMNS = 128;         // of a row that are worth an item
constexpr int64_t LEAST_SHARED_COLUMNS = 128;  // of a prefix: each split leaves a part for each of many rows
constexpr int64_t MAX_SPLITS = 128;            // of each kind: bounds the memory of partial results
constexpr int64_t MAX_GROUPED_PREFIXES = 1024;  // of a bank, counted in shared memory

struct Sizes {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, prefixes, prefix_len, window, multiprocessors, largest_cluster;
  bool causal, bank;
};

// Division of n < 2³¹ by a number that the host knows: a multiplication on the device.
struct Divisor {
  uint32_t by, factor, shift;
  Divisor() = default;
  explicit Divisor(int64_t divisor) : by(uint32_t(divisor)), factor(0), shift(0) {
    while ((uint64_t(1) << shift) < by) ++shift;
    factor = uint32_t(((uint64_t(1) << (31 + shift)) + by - 1) / by);  // 2³¹ ≤ factor < 2³²
  }
};
HOST_DEVICE int operator/(int n, const Divisor& d) { return int(uint64_t(uint32_t(n)) * d.factor >> (31 + d.shift)); }
HOST_DEVICE int operator%(int n, const Divisor& d) { return n - n / d * int(d.by); }

struct Schedule {
  int kv_heads;
  int row_queries;   // of a row and a kv head, counted query by query, then head by head
  int unit_queries;  // of a unit
  int row_units;     // of a row
  int units;         // of a kv head
  int row_warps, shared_warps;    // of a thread block that stand side by side along the queries; the others split the keys
  int tile_units;                 // that one pass over a prefix serves
  int tiles;                      // of a kv head; with a bank an upper bound
  int shared_splits, splits;      // shared_splits 0: row items read the prefix
  int few_warps;                  // of a thread block of the kernel for few queries; 0: the call is not for it
  bool clustered;                 // its splits of a row are a cluster of thread blocks, where the GPU has them
  // The chunks of all row items in a row are cut into equal shares, one a thread block, which may begin and end within an item;
  // length: chunks of an item at most, blocks: of threads. 0: each split of an item is a thread block's.
  int length, blocks;
  Divisor by_kv_heads, by_group, by_unit_queries, by_row_units, by_units, by_tiles, by_shared_splits, by_splits;
  Divisor by_length, by_share;
  HOST_DEVICE int64_t shared_items() const { return int64_t(tiles) * shared_splits * kv_heads; }
  HOST_DEVICE int64_t items() const { return shared_items() + int64_t(units) * splits * kv_heads; }
  HOST_DEVICE bool merges() const { return shared_splits + splits > 1; }
  HOST_DEVICE int64_t merged_queries() const { return int64_t(kv_heads) * units * unit_queries; }
  HOST_DEVICE int64_t places() const { return (shared_splits + splits) * merged_queries(); }
  HOST_DEVICE int64_t seals() const { return length > 0 && merges() ? blocks : 0; }
  HOST_DEVICE int64_t row_blocks() const { return length > 0 ? blocks : items() - shared_items(); }
  // Of a split (shared ones first) and a query in its unit.
  HOST_DEVICE int64_t place(int split, int kv_head, int unit, int query) const {
    return ((int64_t(split) * kv_heads + kv_head) * units + unit) * unit_queries + query;
  }
};

struct Item {
  bool shared;
  int kv_head, split;
  int index;  // of the tile or the unit
};

struct Share {
  int begin, end;
};

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The thread blocks whose shares have chunks of an item: the first one, and how many.
struct Holders {
  int first, count;
};
HOST_DEVICE Holders holders_of(const Schedule& s, int item) {
  const int begin = item * s.length, first = begin / s.by_share;
  return {first, (begin + s.length - 1) / s.by_share - first + 1};
}

HOST_DEVICE Item row_item_of(const Schedule& s, int number) {
  const int rest = number / s.by_splits;
  return {false, rest % s.by_kv_heads, number % s.by_splits, rest / s.by_kv_heads};
}

// Tiles of one prefix run at a time: the first reads it from memory, the others from the L2 cache.
HOST_DEVICE Item item_of(const Schedule& s, int number) {
  const int shared = s.tiles * s.shared_splits * s.kv_heads;
  if (number < shared) {
    const int rest = number / s.by_tiles;
    return {true, rest / s.by_shared_splits, rest % s.by_shared_splits, number % s.by_tiles};
  }
  return row_item_of(s, number - shared);
}

// Of `blocks` blocks those of one split; the last splits may have none.
HOST_DEVICE Share share_of(int blocks, const Divisor& splits, int split) {
  const int size = (blocks + int(splits.by) - 1) / splits, begin = split * size;
  return {begin < blocks ? begin : blocks, begin + size < blocks ? begin + size : blocks};
}

inline int query_warps(int64_t queries, int keys) {
  int warps = least_query_warps(keys);
  while (warps < WARPS && warps * WARP_QUERIES < queries) warps *= 2;
  return warps;
}

inline int64_t own_columns(const Sizes& z) {
  return z.window > 0 ? std::min(z.kv_len, (z.causal ? 1 : 2) * z.window + z.q_len) : z.kv_len;
}

inline bool has_few_queries(const Sizes& z) { return z.q_len * (z.heads / z.kv_heads) <= FEW_QUERIES && serves_few(z.head_dim); }

// The kernel for few queries waits for memory while the L2 cache has time: half as much as a row's own keys, and READ_AGAIN more.
inline bool shares_prefix(const Sizes& z) {
  if (z.batch == 1 || (z.bank && z.prefixes > MAX_GROUPED_PREFIXES)) return false;
  if (!has_few_queries(z)) return z.prefix_len > SHORT_PREFIX;
  const int64_t token = z.kv_heads * z.head_dim * 4;  // bytes
  return token * z.prefix_len > CACHED || z.batch * token * (2 * z.prefix_len - own_columns(z)) > 2 * READ_AGAIN;
}

// Splits of a row of few queries whose thread blocks, with many warps each, have a multiprocessor to themselves and merge what
// they have in a cluster; 0: they would leave too much of the device idle. Clusters of more than two wait for each other where they
// fill the device: measured, those of three and six took a fifth longer than the second kernel takes, and sixteen of eight half as
// long again as eight of eight; those of sixteen pay where a warp of eight has more than two rounds of chunks. Assumed: LONG_BLOCK.
inline int64_t few_cluster_of(const Sizes& z, int64_t row_items, int64_t columns, int64_t chunk) {
  const int64_t multiprocessors = z.multiprocessors;
  const auto fits = [&](int64_t splits) {
    const int64_t items = splits * row_items;
    if (splits == 4 && columns > splits * FEW_WARPS * chunk) return 4 * items <= 3 * multiprocessors;
    if (splits == LARGE_CLUSTER && columns <= splits * FEW_WARPS * chunk) return false;
    return (splits == 2 ? 1 : 2) * items <= multiprocessors;
  };
  int64_t splits = 1;
  while (splits < z.largest_cluster && columns > SHORT_ROW && columns >= 2 * splits * LEAST_COLUMNS && fits(2 * splits)) splits *= 2;
  const int64_t items = splits * row_items;
  const bool enough = 3 * items >= multiprocessors || columns <= LONG_BLOCK * std::min<int64_t>(splits, FEW_CLUSTER);
  return items <= multiprocessors && enough ? splits : 0;
}

// Blocks of work as long as there are columns worth an item, and no more than occupy the device.
inline Schedule schedule_of(const Sizes& z) {
  const int keys = keys_of_block(z.head_dim);
  const int64_t row_queries = z.q_len * (z.heads / z.kv_heads);
  const int64_t unit_queries = std::clamp<int64_t>(row_queries, 1, MAX_SLOTS);
  const int64_t row_units = ceil_div(row_queries, unit_queries), units = z.batch * row_units;
  int64_t columns = own_columns(z);
  Schedule s{};
  s.kv_heads = int(z.kv_heads), s.row_queries = int(row_queries), s.unit_queries = int(unit_queries);
  s.row_units = int(row_units), s.units = int(units);
  s.row_warps = query_warps(unit_queries, keys);
  // Two tiles where one would do: half the products a block of keys and half the merging, for a second reading from the L2 cache.
  s.shared_warps = query_warps(ceil_div(units * unit_queries, 2), keys);
  s.tile_units = int(std::max<int64_t>(1, s.shared_warps * WARP_QUERIES / unit_queries));
  int64_t blocks = 0;  // of all shared items, each as heavy as it has products
  const bool shared = shares_prefix(z);
  if (shared) {
    // The rows of k prefixes fill less than k more tiles than the rows of one.
    const int64_t used = z.bank ? std::min(z.prefixes, z.batch) : 1;
    s.tiles = int((units - used) / s.tile_units + used);
    blocks = ceil_div(z.prefix_len, keys) * s.tiles * z.kv_heads * s.shared_warps / 2;
  } else {
    columns += z.prefix_len;
  }
  blocks += ceil_div(columns, keys) * units * z.kv_heads;
  const bool few = !shared && has_few_queries(z);
  const int resident = few ? FEW_BLOCKS : blocks_on_multiprocessor(z.head_dim);
  const int64_t slots = resident * z.multiprocessors, row_items = units * z.kv_heads;
  const int64_t share = std::max<int64_t>(1, ceil_div(blocks, slots)) * keys;
  const auto splits = [](int64_t of, int64_t size) { return int(std::clamp<int64_t>(ceil_div(of, size), 1, MAX_SPLITS)); };
  if (shared) s.shared_splits = splits(z.prefix_len, std::max(LEAST_SHARED_COLUMNS, 2 * share / s.shared_warps));
  const bool fits = !shared && !few && row_items <= slots && row_items * 10 >= slots * 9;  // one round of thread blocks
  s.splits = (!shared && columns <= SHORT_ROW) || fits ? 1 : splits(columns, std::max(LEAST_COLUMNS, share));
  if (few) {
    const int chunk = keys_of_few_chunk(z.head_dim);
    const int64_t length = ceil_div(z.prefix_len, chunk) + ceil_div(columns - z.prefix_len, chunk);
    const int64_t total = length * row_items, equal = ceil_div(total, slots);
    const int64_t cluster = few_cluster_of(z, row_items, columns, chunk);
    if (cluster > 0) {
      s.splits = int(cluster);
    } else if (const int64_t items = row_items * s.splits;  // where whole items leave the last round of thread blocks idle
               length <= 32768 && total <= INT32_MAX - length && equal * chunk > LEAST_COLUMNS && columns > SHORT_ROW &&
               items * 20 < ceil_div(items, slots) * slots * 19 && length <= equal * (MAX_SPLITS - 2)) {
      s.length = int(length), s.blocks = int(ceil_div(total, equal));
      s.splits = equal % length ? int(ceil_div(length - 1, equal)) + 1 : 1;
      s.by_length = Divisor(length), s.by_share = Divisor(equal);
    }
    s.clustered = s.length == 0 && s.splits > 1 && (cluster > 0 || s.splits == 2);
    // All of its chunks at a time, or in equal rounds.
    const int64_t each = std::max<int64_t>(1, ceil_div(length, s.splits)), rounds = ceil_div(each, FEW_WARPS);
    s.few_warps = cluster > 0 ? int(std::clamp<int64_t>(ceil_div(each, rounds), WARPS, FEW_WARPS)) : WARPS;
  }
  s.by_kv_heads = Divisor(z.kv_heads), s.by_group = Divisor(z.heads / z.kv_heads), s.by_unit_queries = Divisor(unit_queries);
  s.by_row_units = Divisor(row_units), s.by_units = Divisor(units), s.by_splits = Divisor(s.splits);
  s.by_tiles = Divisor(std::max(1, s.tiles)), s.by_shared_splits = Divisor(std::max(1, s.shared_splits));
  return s;
}

// float32 numbers of the partial results: for each place its sums [head_dim], then its largest score and its total; seals of two.
inline int64_t part_values(const Schedule& s, int64_t head_dim) {
  return s.merges() ? s.places() * (head_dim + 2) + 2 * s.seals() : 0;
}

}  // namespace prefix_kernels::cuda
