// The kernels of every instruction set, behind one table of functions. A kernel runs tasks begin … end of a call; tasks are
// independent, and each result is written by exactly one task, in a fixed order.
#pragma once

#include "problem.h"

namespace prefix_kernels {

// A step with few queries a sequence. A tile holds the query rows of one kv head of several sequences with one prefix: sequence
// by sequence, query by query, the heads of the group innermost.
struct DecodePlan {
  const int64_t* order;       // sequences, those with the same prefix side by side
  const int64_t* tile_first;  // [tiles + 1] into `order`: the sequences of each tile
  int64_t tiles;
  int64_t splits;             // the prefix is cut into so many ranges of columns; 0: it is met with a sequence's own keys
  int64_t split_len;          // columns of each
  int64_t max_q_len;
  float* partial;             // [splits, sequences, heads, max_q_len, value_dim + 2]: accumulator, maximum, sum
};

struct Kernels {
  const char* name;
  int64_t rows;   // query rows of a tile
  int64_t lanes;
  // Tasks: (sequence, kv head, tile); tile_first [sequences + 1] counts the tiles of the sequences before.
  void (*forward)(const Problem&, const int64_t* tile_first, int64_t begin, int64_t end);
  // Tasks: (kv head, part).
  void (*backward)(const Problem&, const Gradients&, const Part* parts, int64_t part_count, int64_t begin, int64_t end);
  // Tasks: (kv head, tile, split).
  void (*decode_prefix)(const Problem&, const DecodePlan&, int64_t begin, int64_t end);
  // Tasks: (kv head, sequence).
  void (*decode_own)(const Problem&, const DecodePlan&, int64_t begin, int64_t end);
};

// The kernels in use: the widest vectors this processor has, unless `use_kernels` chose others.
const Kernels& kernels();
// Null where the processor lacks them or the name is unknown.
const Kernels* use_kernels(const char* name);

}  // namespace prefix_kernels
