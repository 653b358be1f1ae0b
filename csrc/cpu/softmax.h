// The online softmax of a tile: running maximum and sum of each query row, and the accumulator.
//
//     m' ≥ max(m, max_n s_n) − SLACK   α = 2^(m − m')   l' = α · l + Σ_n 2^(s_n − m')   acc' = α · acc + Σ_n 2^(s_n − m') · v_n
#pragma once

#include <cmath>

#include "tile.h"

namespace prefix_kernels::ISA {

struct SoftmaxState {
  Vec m[2] = {splat(-INF), splat(-INF)};  // about the maximum so far, in units of log2
  Vec l[2] = {};                          // Σ 2^(s − m)
};

// m where it is finite, and 0 for rows that have seen nothing: −inf − 0 stays −inf, and 2^−inf is 0.
inline Vec finite_maximum(Vec m) { return m == -INF ? Vec{} : m; }

// The natural logarithm of Σ exp(scores), rounded once.
inline float log_sum_exp(float m, float l) {
  return l == 0.0f ? -INF : float((double(m) + std::log2(double(l))) * 0.693147180559945309);
}

// A tile of query rows and what it has seen so far.
template <typename Unit>
struct AttendTile {
  typename Unit::Columns q;
  alignas(64) float acc[MAX_DIM][ROWS];
  SoftmaxState state;
  TileRows rows;
};

constexpr int64_t GROUP = 4;  // tiles that meet keys one after the other, so that these are prepared once

// What a group needs while it meets keys.
template <typename Unit>
struct Attend {
  typename Unit::Keys keys, values;
  typename Unit::template Weights<true, false> weights;
  alignas(64) float scores[KEYS][ROWS];
  alignas(64) float buffer[ROWS * MAX_DIM];  // rows on their way in and out
  BiasTile bias;

  void start(const Problem& p, AttendTile<Unit>& tile) {
    tile.state = SoftmaxState();
    read_rows(p.q, tile.rows, p.head_dim, buffer);
    tile.q.pack(buffer, p.head_dim, tile.rows.vectors());
    std::fill_n(tile.acc[0], p.value_dim * ROWS, 0.0f);
  }

  // Tiles meet keys first … last of one segment, whose visible ranges must be set in them. Keys are cut at multiples of KEYS and
  // read as far as they exist, so that a tile's result does not depend on those it goes with.
  void attend(const Problem& p, AttendTile<Unit>* tiles, int64_t tile_count, const Segment& segment, int64_t first,
              int64_t last) {
    int64_t from = last, to = first;
    for (int64_t i = 0; i < tile_count; ++i)
      from = std::min(from, tiles[i].rows.any_from), to = std::max(to, tiles[i].rows.any_to);
    first += std::max<int64_t>(0, from - first) / KEYS * KEYS, last = std::min(last, segment.count), to = std::min(to, last);
    for (; first < to; first += KEYS) {
      const int64_t count = std::min<int64_t>(KEYS, last - first), next = first + KEYS;
      const bool waits = tile_count == 1;  // for memory: there is little work a key
      if (waits) prefetch(segment.v, segment.v_first, first, count, p.value_dim);
      keys.read(segment.k, segment.k_first, first, count, p.head_dim);
      values.read(segment.v, segment.v_first, first, count, p.value_dim);
      values.transpose(count, p.value_dim);
      for (int64_t i = 0; i < tile_count; ++i) {
        const TileRows& rows = tiles[i].rows;
        if (rows.any_from < first + count && first < rows.any_to)
          meet(p, tiles[i], segment, first, std::min(count, rows.any_to - first));
      }
      if (waits && next < to) prefetch(segment.k, segment.k_first, next, std::min<int64_t>(KEYS, last - next), p.head_dim);
    }
  }

 private:
  void meet(const Problem& p, AttendTile<Unit>& tile, const Segment& segment, int64_t first, int64_t count) {
    const int vectors = tile.rows.vectors();
    Unit::multiply(keys, count, tile.q, p.head_dim, vectors, scores);
    const float factor = finish_scores(p, tile.rows, segment, first, count, bias, scores, nullptr);
    weights.start(scores, count);
    for (int u = 0; u < vectors; ++u) weigh(p, tile, u, count, factor);
    Unit::add_weighted(values, count, weights, p.value_dim, vectors, tile.acc);
  }

  // Scores of one vector of rows become weights 2^(s − m). A row's m stays, and with it its accumulator, while no score is more
  // than the unit's SLACK above it: neither weights nor sums come near the largest float.
  void weigh(const Problem& p, AttendTile<Unit>& tile, int u, int64_t count, float factor) {
    const Vec before = tile.state.m[u];
    Vec top = splat(-INF), l{};
    for (int64_t n = 0; n < count; ++n) top = max(top, load(scores[n] + u * LANES));
    top = top * factor;
    const IntVec stays = top <= before + Unit::SLACK;
    const Vec m = stays ? before : max(before, top), base = finite_maximum(m);
    const auto weight = [&](int64_t n) {
      const Vec w = Unit::exp2(load(scores[n] + u * LANES) * factor - base);
      l += w;
      return w;
    };
    int64_t n = 0;
    for (; n + 1 < count; n += 2) {
      const Vec even = weight(n), odd = weight(n + 1);
      weights.put(0, n, u, even, odd);
    }
    if (n < count) weights.put(0, n, u, weight(n), Vec{});
    if (all(stays)) {
      tile.state.l[u] += l;
      return;
    }
    const Vec alpha = exp2(before - base);
    tile.state.m[u] = m, tile.state.l[u] = tile.state.l[u] * alpha + l;
    for (int64_t d = 0; d < p.value_dim; ++d) store(tile.acc[d] + u * LANES, load(tile.acc[d] + u * LANES) * alpha);
  }
};

}  // namespace prefix_kernels::ISA
