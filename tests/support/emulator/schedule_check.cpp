// What must hold of csrc/cuda/schedule.h, over many sizes: every query meets every column once, partial results lie apart and
// within what is allocated, and numbers fit 32 bit. Prints how many schedules it looked at.
#include "cuda/schedule.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <tuple>
#include <vector>

using namespace prefix_kernels::cuda;

static Sizes z;

#define HOLDS(condition)                                                                                                 \
  do                                                                                                                     \
    if (!(condition)) {                                                                                                  \
      std::fprintf(stderr, "line %d: %s\nbatch %ld heads %ld/%ld q_len %ld kv_len %ld head_dim %ld prefixes %ld × %ld\n", \
                   __LINE__, #condition, long(z.batch), long(z.heads), long(z.kv_heads), long(z.q_len), long(z.kv_len),  \
                   long(z.head_dim), long(z.prefixes), long(z.prefix_len));                                             \
      std::exit(1);                                                                                                      \
    }                                                                                                                    \
  while (false)

static void check_divisors(std::mt19937& random) {
  std::vector<int64_t> divisors{1, 2, 3, 5, 7, 64, 127, 128, 1000, 65535, 65536, 65537, 1000003, INT32_MAX};
  for (int i = 0; i < 200; ++i) divisors.push_back(1 + random() % (1 << (1 + i % 30)));
  for (const int64_t d : divisors) {
    const Divisor by(d);
    std::vector<int64_t> numbers{0, 1, d - 1, d, INT32_MAX, INT32_MAX - 1, INT32_MAX / d * d, INT32_MAX / d * d - 1};
    for (int i = 0; i < 200; ++i) numbers.push_back(random() >> 1);
    for (const int64_t n : numbers)
      if (n >= 0 && n <= INT32_MAX) HOLDS(int(n) / by == n / d && int(n) % by == n % d);
  }
}

static void check_shares() {
  for (int blocks = 0; blocks < 300; ++blocks)
    for (int splits = 1; splits <= 128; ++splits) {
      int next = 0;
      for (int split = 0; split < splits; ++split) {
        const Share share = share_of(blocks, Divisor(splits), split);
        HOLDS(share.begin == next && share.begin <= share.end);
        next = share.end;
      }
      HOLDS(next == blocks);
    }
}

static void check_items(const Schedule& s) {
  std::set<std::tuple<bool, int, int, int>> seen;
  for (int number = 0; number < s.items(); ++number) {
    const Item item = item_of(s, number);
    HOLDS(item.shared == (number < s.shared_items()));
    HOLDS(0 <= item.kv_head && item.kv_head < s.kv_heads);
    HOLDS(0 <= item.split && item.split < (item.shared ? s.shared_splits : s.splits));
    HOLDS(0 <= item.index && item.index < (item.shared ? s.tiles : s.units));
    HOLDS(seen.insert({item.shared, item.kv_head, item.split, item.index}).second);
  }
}

static void check_places(const Schedule& s) {
  int64_t next = 0;
  for (int split = 0; split < s.shared_splits + s.splits; ++split)
    for (int kv_head = 0; kv_head < s.kv_heads; ++kv_head)
      for (int unit = 0; unit < s.units; ++unit)
        for (int query = 0; query < s.unit_queries; ++query) HOLDS(s.place(split, kv_head, unit, query) == next++);
  HOLDS(next == s.places());
}

// Rows with their prefixes as tile.h counts them.
static void check_bank(const Schedule& s, std::mt19937& random) {
  std::vector<int64_t> rows(z.prefixes);
  const int64_t favoured = 1 + random() % z.prefixes;
  for (int64_t row = 0; row < z.batch; ++row) ++rows[random() % favoured];
  int64_t tiles = 0;
  for (const int64_t count : rows) tiles += ceil_div(count * s.row_units, s.tile_units);
  HOLDS(tiles <= s.tiles);
}

// Every chunk of every row item is in one share, and the parts of an item are numbered as holders_of says.
static void check_continuous(const Schedule& s) {
  const int items = s.units * s.kv_heads, share = int(s.by_share.by);
  HOLDS(int64_t(s.blocks) * share >= int64_t(items) * s.length && int64_t(s.blocks - 1) * share < int64_t(items) * s.length);
  for (int item = 0; item < items; ++item) {
    const Holders holders = holders_of(s, item);
    HOLDS(holders.count >= 1 && holders.count <= s.splits && holders.first + holders.count <= s.blocks);
    HOLDS(int64_t(holders.first) * share <= int64_t(item) * s.length);
    HOLDS(int64_t(holders.first + holders.count) * share >= int64_t(item + 1) * s.length);
    HOLDS(int64_t(holders.first + holders.count - 1) * share < int64_t(item + 1) * s.length);
  }
}

static void check(const Schedule& s, std::mt19937& random) {
  const int keys = keys_of_block(z.head_dim);
  HOLDS(s.row_queries == z.q_len * (z.heads / z.kv_heads));
  HOLDS(s.unit_queries <= MAX_SLOTS && s.unit_queries <= s.row_warps * WARP_QUERIES);
  HOLDS(int64_t(s.row_units) * s.unit_queries >= s.row_queries && int64_t(s.row_units - 1) * s.unit_queries < s.row_queries);
  HOLDS(s.units == z.batch * s.row_units);
  for (const int warps : {s.row_warps, s.shared_warps})
    HOLDS(WARPS % warps == 0 && warps >= least_query_warps(keys) && WARPS / warps * CHUNK <= keys);
  HOLDS(s.splits >= 1 && s.splits <= MAX_SPLITS && s.shared_splits <= MAX_SPLITS);
  HOLDS(s.items() > 0 && s.items() <= INT32_MAX && s.shared_items() <= INT32_MAX);
  HOLDS(shares_prefix(z) == (s.shared_splits > 0) && (s.shared_splits > 0) == (s.tiles > 0));
  if (s.shared_splits > 0) {
    HOLDS(s.tile_units * s.unit_queries <= MAX_SLOTS && s.tile_units * s.unit_queries <= s.shared_warps * WARP_QUERIES);
    if (z.bank)
      check_bank(s, random);
    else
      HOLDS(int64_t(s.tiles) * s.tile_units >= s.units && int64_t(s.tiles - 1) * s.tile_units < s.units);
  }
  const int64_t one = z.batch * z.heads * z.q_len * (z.head_dim + 2);  // the result of every query, once
  HOLDS(part_values(s, z.head_dim) <= 2 * (s.shared_splits + s.splits) * one);
  HOLDS((part_values(s, z.head_dim) == 0) == (s.shared_splits + s.splits == 1));
  // Several splits of much work alone: about as many items as the device takes, or the results of large batches would be many.
  const int64_t row_items = int64_t(s.units) * s.kv_heads;
  // Equal shares of long rows: each thread block leaves two at most of which others have a part.
  const int64_t parts = row_items * (s.splits - 1), resident = blocks_on_multiprocessor(z.head_dim) * z.multiprocessors;
  HOLDS(s.splits == 1 || parts <= 2 * resident || (s.length > 0 && parts <= std::max<int64_t>(3 * s.blocks, row_items)));
  if (s.length > 0) check_continuous(s);
  // Clusters have no more thread blocks than every GPU takes, and of more than two leave a quarter of the device free.
  HOLDS(!s.clustered || (s.few_warps > 0 && s.length == 0 && 1 < s.splits && s.splits <= z.largest_cluster));
  HOLDS(!s.clustered || s.splits == 2 || 4 * row_items * s.splits <= 3 * z.multiprocessors);
  HOLDS(s.few_warps == 0 || (s.shared_splits == 0 && WARPS <= s.few_warps && s.few_warps <= FEW_WARPS));
  if (s.items() <= 3000) check_items(s);
  if (s.places() <= 20000) check_places(s);
}

int main() {
  std::mt19937 random(0);
  check_divisors(random);
  check_shares();
  int count = 0;
  const std::pair<int64_t, int64_t> heads[] = {{32, 8}, {16, 16}, {9, 3}, {71, 1}, {8, 1}, {2, 1}};
  for (const int64_t batch : {1, 2, 3, 8, 31, 64, 256})
    for (const auto& [h, kv] : heads)
      for (const int64_t q_len : {1, 3, 8})
        for (const int64_t kv_len : {0, 1, 128, 1024, 100000})
          for (const int64_t prefix_len : {0, 1, 16, 64, 65, 512, 2048, 65536})
            for (const int64_t prefixes : {0, 1, 7, 2000})
              for (const int64_t window : {0, 100}) {
                z = Sizes{batch, h, kv, q_len, kv_len, count % 3 ? 128 : 256, std::max<int64_t>(1, prefixes), prefix_len,
                          window, count % 2 ? 132 : 7, count % 3 ? LARGE_CLUSTER : FEW_CLUSTER, count % 5 != 0, prefixes > 0};
                check(schedule_of(z), random);
                ++count;
              }
  std::printf("%d schedules\n", count);
}
