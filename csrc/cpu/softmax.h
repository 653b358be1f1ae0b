// The online softmax of a tile: running maximum and sum of each query row, and the accumulator.
//
//     m' = max(m, max_n s_n)   α = 2^(m − m')   l' = α · l + Σ_n 2^(s_n − m')   acc' = α · acc + Σ_n 2^(s_n − m') · v_n
#pragma once

#include <cmath>

#include "tile.h"

namespace prefix_kernels::ISA {

struct SoftmaxState {
  Vec m[2] = {splat(-INF), splat(-INF)};  // maximum so far, in units of log2
  Vec l[2] = {};                          // Σ 2^(s − m)
};

// m where it is finite, and 0 for rows that have seen nothing: −inf − 0 stays −inf, and 2^−inf is 0.
inline Vec finite_maximum(Vec m) { return m == -INF ? Vec{} : m; }

// The natural logarithm of Σ exp(scores), rounded once.
inline float log_sum_exp(float m, float l) {
  return l == 0.0f ? -INF : float((double(m) + std::log2(double(l))) * 0.693147180559945309);
}

// Everything that one tile of query rows needs while it meets its keys.
struct AttendTile {
  alignas(64) float q[MAX_DIM][ROWS];
  alignas(64) float acc[MAX_DIM][ROWS];
  alignas(64) float scores[KEYS][ROWS];
  alignas(64) float keys[KEYS * MAX_DIM], values[KEYS * MAX_DIM];  // widened from 16 bit; also the rows on their way in and out
  SoftmaxState state;
  TileRows rows;
  Shift unshifted;
  BiasTile bias;

  static_assert(ROWS <= KEYS);

  void start(const Problem& p) {
    state = SoftmaxState();
    read_rows(p.q, rows, p.head_dim, keys);
    transpose_rows(keys, p.head_dim, rows.vectors(), q);
    std::fill_n(acc[0], p.value_dim * ROWS, 0.0f);
  }

  // Keys first … last of a segment; the tile's visible ranges must be set for it.
  void attend(const Problem& p, const Segment& segment, int64_t first, int64_t last) {
    first = std::max(first, rows.any_from), last = std::min(last, rows.any_to);
    for (; first < last; first += KEYS) {
      const int64_t count = std::min<int64_t>(KEYS, last - first);
      const KeyTile k = widen(segment.k, segment.k_first, first, count, p.head_dim, keys);
      compute_scores(p, rows, segment, first, count, k, q, unshifted, bias, scores, nullptr);
      for (int u = 0; u < rows.vectors(); ++u) weigh(p, u, count);
      const KeyTile v = widen(segment.v, segment.v_first, first, count, p.value_dim, values);
      if (rows.vectors() == 2)
        product<2, Left::columns>(p.value_dim, v.data, v.stride, scores[0], ROWS, acc[0], ROWS, count, true);
      else
        product<1, Left::columns>(p.value_dim, v.data, v.stride, scores[0], ROWS, acc[0], ROWS, count, true);
    }
  }

 private:
  // Scores of one vector of rows become weights 2^(s − m'); the accumulator is rescaled to m'.
  void weigh(const Problem& p, int u, int64_t count) {
    Vec m = state.m[u];
    for (int64_t n = 0; n < count; ++n) m = max(m, load(scores[n] + u * LANES));
    const Vec base = finite_maximum(m), alpha = exp2(state.m[u] - base);
    Vec l = state.l[u] * alpha;
    for (int64_t n = 0; n < count; ++n) {
      const Vec weight = exp2(load(scores[n] + u * LANES) - base);
      store(scores[n] + u * LANES, weight);
      l += weight;
    }
    state.m[u] = m, state.l[u] = l;
    for (int64_t d = 0; d < p.value_dim; ++d) store(acc[d] + u * LANES, load(acc[d] + u * LANES) * alpha);
  }
};

}  // namespace prefix_kernels::ISA
