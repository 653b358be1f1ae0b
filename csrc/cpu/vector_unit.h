// The products of a tile on the processor's vectors, in float32; 16 bit is widened as it is read.
//
// A unit gives what a tile of query rows needs while it meets a tile of keys (or values): the tile's rows as right factors of
// two kinds, keys, weights, and three products. MatrixUnit (matrix_unit.h) is the other one.
#pragma once

#include "tile.h"

namespace prefix_kernels::ISA {

struct VectorUnit {
  static constexpr int OUTER_TILES = 1;  // tiles of rows that add_outer takes together
  static constexpr float SLACK = 8.0f;   // of a running maximum, in units of log2

  // Whether a tile of ROWS is worth it for so few. Measured: with AVX-512 where they fill half of a vector.
  static bool fills_tile(int rows, int64_t dim) { return rows > LANES / 2 - (dim <= 64); }

  static Vec exp2(Vec x) { return ISA::exp2(x); }

  // Rows of queries (or of dout) as a right factor [dim][ROWS].
  struct Columns {
    alignas(64) float at[MAX_DIM][ROWS];
    void pack(const float* rows, int64_t dim, int vectors) { transpose_rows(rows, dim, vectors, at); }
  };

  // The same of OUTER_TILES tiles as a right factor [OUTER_TILES · ROWS][dim]: a view.
  struct Rows {
    const float* at;
    void pack(int, const float* rows, int64_t, int) { at = rows; }
  };

  // Keys (or values) first … first + count of a segment: where they are, or widened into `buffer`.
  struct Keys {
    const float* data;
    int64_t stride;
    alignas(64) float buffer[KEYS * MAX_DIM];

    void read(const Strided& from, int64_t offset, int64_t first, int64_t count, int64_t dim) {
      data = buffer, stride = dim;
      if (from.element == Element::float32 && from.size == dim)
        data = static_cast<const float*>(from.data) + offset + first * from.token, stride = from.token;
      else
        for (int64_t n = 0; n < count; ++n) read_row(from, offset + (first + n) * from.token, dim, buffer + n * dim);
    }
    void transpose(int64_t, int64_t) {}
  };

  // What keys are weighted by, [KEYS][ROWS]: in the place of the scores. WEIGHTED for add_weighted, OUTER for add_outer.
  template <bool WEIGHTED, bool OUTER>
  struct Weights {
    float (*at)[ROWS];
    void start(float (*scores)[ROWS], int64_t) { at = scores; }
    // Those of keys n and n + 1 for vector u of the tile's rows; n is even.
    void put(int, int64_t n, int u, Vec first, Vec second) {
      store(at[n] + u * LANES, first), store(at[n + 1] + u * LANES, second);
    }
    void clear(int) {}
  };

  // scores[count][ROWS] = keys · columns
  static void multiply(const Keys& keys, int64_t count, const Columns& columns, int64_t dim, int vectors,
                       float (*scores)[ROWS]) {
    product_columns<Left::rows>(count, vectors * LANES, keys.data, keys.stride, columns.at[0], ROWS, scores[0], ROWS, dim, false);
  }

  // sums[dim][ROWS] += keysᵀ · weights[count][ROWS]
  template <bool OUTER>
  static void add_weighted(const Keys& keys, int64_t count, const Weights<true, OUTER>& weights, int64_t dim, int vectors,
                           float (*sums)[ROWS]) {
    product_columns<Left::columns>(dim, vectors * LANES, keys.data, keys.stride, weights.at[0], ROWS, sums[0], ROWS, count, true);
  }

  // sums[count][dim] += weights[count][row_count] · rows
  template <bool WEIGHTED>
  static void add_outer(const Weights<WEIGHTED, true>& weights, int64_t count, const Rows& rows, int64_t row_count, int64_t dim,
                        float* sums, int64_t stride) {
    product_columns<Left::rows>(count, dim, weights.at[0], ROWS, rows.at, dim, sums, stride, row_count, true);
  }
};

}  // namespace prefix_kernels::ISA
