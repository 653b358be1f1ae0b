// The products of a tile on the processor's matrix unit (Intel AMX): bfloat16 factors, float32 sums.
//
// A tile register holds 16 rows of 64 bytes: 16 × 16 float32 of a result, 16 × 32 bfloat16 of a left factor as it lies in
// memory, or 32 × 16 of a right factor, where two steps of a lane lie side by side (a pair). What has fewer steps than 32 is
// filled up with zeros. An instruction multiplies and adds 16 × 16 × 32.
#pragma once

#include <immintrin.h>

#include <array>

#include "tile.h"

namespace prefix_kernels::ISA {

struct MatrixUnit {
  static constexpr int SIDE = 16, STEPS = 32;  // rows of a tile register, and lanes of a result; steps of a product
  static_assert(LANES == SIDE && ROWS == STEPS);
  static constexpr int OUTER_TILES = 4;
  static constexpr float SLACK = 0.0f;  // the largest weight is 1, which is not rounded: where it is alone, an error would show
  static bool fills_tile(int rows, int64_t) { return rows > 1; }
  using Pair = uint32_t;  // the earlier step in the low half

  static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  // Tile registers keep their shapes from here on, and nothing but this unit uses them.
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
    } shapes;
    asm volatile("" ::"r"(&shapes) : "memory");  // the next line says that it reads eight bytes
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;

  static __m512i round_pair(Vec high, Vec low) { return bits<__m512i>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low))); }

  // 2^x for x ≤ 127, 0 for −inf, for weights that are rounded to bfloat16: relative error below 5e-6.
  static Vec exp2(Vec x) {
    const __m512 r = _mm512_reduce_ps(bits<__m512>(x), 0);  // less the nearest integer
    const Vec fraction = bits<Vec>(r);
    Vec p = splat(9.5701e-3f);
    p = p * fraction + 5.591786e-2f;
    p = p * fraction + 2.4024745e-1f;
    p = p * fraction + 6.9312181e-1f;
    p = p * fraction + 9.9999926e-1f;
    return bits<Vec>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(x - fraction)));
  }

  // Rows of queries (or of dout) as a right factor [dim][ROWS].
  struct Columns {
    alignas(64) Pair at[MAX_DIM / 2][ROWS];

    void pack(const float* rows, int64_t dim, int vectors) {
      for (int u = 0; u < vectors; ++u)
        for (int64_t d = 0; d < padded(dim, STEPS); d += STEPS) {
          Vec block[LANES];
          for (int i = 0; i < LANES; ++i) {
            const float* row = rows + (u * LANES + i) * dim + d;
            const Vec high = d + LANES < dim ? load(row + LANES) : Vec{};
            block[i] = bits<Vec>(round_pair(high, load(row)));
          }
          ISA::transpose(block);
          for (int i = 0; i < LANES; ++i) store(reinterpret_cast<float*>(at[d / 2 + i] + u * LANES), block[i]);
        }
    }
  };

  // The same of OUTER_TILES tiles as a right factor [OUTER_TILES · ROWS][dim].
  struct Rows {
    alignas(64) Pair at[OUTER_TILES * ROWS / 2][MAX_DIM];

    void pack(int tile, const float* rows, int64_t dim, int vectors) {
      for (int64_t r = 0; r < ROWS; r += 2)
        for (int64_t d = 0; d < dim; d += LANES) {
          const bool is_row = r < vectors * LANES;
          const Vec low = is_row ? load(rows + r * dim + d) : Vec{}, high = is_row ? load(rows + (r + 1) * dim + d) : Vec{};
          store_pairs(round_pair(high, low), at[(tile * ROWS + r) / 2] + d);
        }
    }
  };

  // Keys (or values) first … first + count of a segment, of a multiple of SIDE keys and STEPS dimensions: where they are, or
  // copied into `buffer`; and transposed where they are weighted.
  struct Keys {
    const bfloat16* data;
    int64_t stride;
    alignas(64) bfloat16 buffer[KEYS * MAX_DIM], columns[MAX_DIM][KEYS];

    void read(const Strided& from, int64_t offset, int64_t first, int64_t count, int64_t dim) {
      if (from.element == Element::bfloat16 && from.size == dim && dim % STEPS == 0 && count % SIDE == 0) {
        data = static_cast<const bfloat16*>(from.data) + offset + first * from.token, stride = from.token;
        return;
      }
      data = buffer, stride = padded(dim, STEPS);
      std::fill_n(buffer, padded(count, SIDE) * stride, bfloat16(0));
      alignas(64) float row[MAX_DIM];
      for (int64_t n = 0; n < count; ++n) {
        read_row(from, offset + (first + n) * from.token, dim, row);
        for (int64_t d = 0; d < dim; d += LANES) store(buffer + n * stride + d, load(row + d));
      }
    }

    void transpose(int64_t count, int64_t dim) {
      static constexpr bfloat16 zeros[MAX_DIM] = {};
      for (int64_t n = 0; n < count; n += STEPS) {
        const bfloat16* rows[STEPS];
        for (int i = 0; i < STEPS; ++i) rows[i] = n + i < count ? data + (n + i) * stride : zeros;
        for (int64_t d = 0; d < dim; d += 8) transpose_block(rows, d, columns[d] + n);
      }
    }
  };

  // What keys are weighted by: as right factor [KEYS][ROWS] for add_weighted, as left factor [KEYS][OUTER_TILES · ROWS] for
  // add_outer.
  template <bool WEIGHTED, bool OUTER>
  struct Weights {
    alignas(64) Pair right[WEIGHTED ? KEYS / 2 : 1][ROWS];
    alignas(64) bfloat16 left[OUTER ? KEYS : 1][OUTER_TILES * ROWS];

    void start(float (*)[ROWS], int64_t count) {
      if (WEIGHTED && count % STEPS) std::fill(right[(count + 1) / 2], right[padded(count, STEPS) / 2], Pair(0));
    }
    // Those of keys n and n + 1 for vector u of the tile's rows; n is even.
    void put(int tile, int64_t n, int u, Vec first, Vec second) {
      const __m512i both = round_pair(second, first);
      if (WEIGHTED) store_pairs(both, right[n / 2] + u * LANES);
      if (OUTER) {
        const auto at = [&](int64_t key) { return reinterpret_cast<__m256i*>(left[key] + tile * ROWS + u * LANES); };
        _mm256_store_si256(at(n), _mm512_castsi512_si256(both));
        _mm256_store_si256(at(n + 1), _mm512_extracti64x4_epi64(both, 1));
      }
    }
    // A tile that has not all rows, or does not meet these keys.
    void clear(int tile) {
      for (auto& key : left) std::fill_n(key + tile * ROWS, ROWS, bfloat16(0));
    }
  };

  // scores[count][ROWS] = keys · columns; up to a multiple of SIDE keys are written.
  static void multiply(const Keys& keys, int64_t count, const Columns& columns, int64_t dim, int vectors,
                       float (*scores)[ROWS]) {
    product(padded(count, SIDE), vectors * LANES, padded(dim, STEPS), keys.data, keys.stride, columns.at[0], ROWS, scores[0],
            ROWS, false);
  }

  // sums[dim][ROWS] += keysᵀ · weights[count][ROWS]
  template <bool OUTER>
  static void add_weighted(const Keys& keys, int64_t count, const Weights<true, OUTER>& weights, int64_t dim, int vectors,
                           float (*sums)[ROWS]) {
    product(dim, vectors * LANES, padded(count, STEPS), keys.columns[0], KEYS, weights.right[0], ROWS, sums[0], ROWS, true);
  }

  // sums[count][dim] += weights[count][row_count] · rows
  template <bool WEIGHTED>
  static void add_outer(const Weights<WEIGHTED, true>& weights, int64_t count, const Rows& rows, int64_t row_count, int64_t dim,
                        float* sums, int64_t stride) {
    const int64_t whole = count / SIDE * SIDE, steps = padded(row_count, STEPS), left_stride = OUTER_TILES * ROWS;
    product(whole, dim, steps, weights.left[0], left_stride, rows.at[0], MAX_DIM, sums, stride, true);
    if (whole == count) return;
    alignas(64) float rest[SIDE * MAX_DIM];  // what lies behind the last key may be another's
    product(SIDE, dim, steps, weights.left[whole], left_stride, rows.at[0], MAX_DIM, rest, dim, false);
    for (int64_t n = whole; n < count; ++n)
      for (int64_t d = 0; d < dim; d += LANES) {
        float* at = sums + n * stride + d;
        store(at, load(at) + load(rest + (n - whole) * dim + d));
      }
  }

 private:
  // LANES low halves and LANES high ones, as pairs.
  static void store_pairs(__m512i both, Pair* to) {
    static constexpr auto order = [] {
      std::array<uint16_t, 2 * LANES> from{};
      for (int i = 0; i < LANES; ++i) from[2 * i] = i, from[2 * i + 1] = LANES + i;
      return from;
    }();
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(order.data()), both));
  }

  // to[8][KEYS]: dimensions d … d + 8 of STEPS keys. A lane of 16 bytes holds eight dimensions of one key; eight keys, one from
  // each of eight vectors, change places with them in every lane.
  static void transpose_block(const bfloat16* const* rows, int64_t d, bfloat16* to) {
    __m512i m[8], next[8];
    for (int i = 0; i < 8; ++i) {
      const auto lane = [&](int key) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[key] + d)); };
      m[i] = _mm512_castsi128_si512(lane(i));
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0x00f0, lane(i + 8));
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0x0f00, lane(i + 16));
      m[i] = _mm512_mask_broadcast_i32x4(m[i], 0xf000, lane(i + 24));
    }
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = _mm512_unpacklo_epi16(m[i], m[i + 4]);
      next[2 * i + 1] = _mm512_unpackhi_epi16(m[i], m[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      m[2 * i] = _mm512_unpacklo_epi16(next[i], next[i + 4]);
      m[2 * i + 1] = _mm512_unpackhi_epi16(next[i], next[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      _mm512_store_si512(to + 2 * i * KEYS, _mm512_unpacklo_epi16(m[i], m[i + 4]));
      _mm512_store_si512(to + (2 * i + 1) * KEYS, _mm512_unpackhi_epi16(m[i], m[i + 4]));
    }
  }

  // c[m][n] (+)= Σ_steps a · b for m and n in multiples of SIDE, steps in multiples of STEPS. Strides in elements.
  static void product(int64_t m, int64_t n, int64_t steps, const bfloat16* a, int64_t a_stride, const Pair* b, int64_t b_stride,
                      float* c, int64_t c_stride, bool add) {
    for (int64_t i = 0; i < m; i += 2 * SIDE)
      for (int64_t j = 0; j < n; j += 2 * SIDE) {
        const auto run = m - i > SIDE ? (n - j > SIDE ? block<true, true> : block<true, false>)
                                      : (n - j > SIDE ? block<false, true> : block<false, false>);
        run(steps, a + i * a_stride, a_stride, b + j, b_stride, c + i * c_stride + j, c_stride, add);
      }
  }

  // One or two rows of tile registers, and columns.
  template <bool LOWER, bool RIGHT>
  static void block(int64_t steps, const bfloat16* a, int64_t a_stride, const Pair* b, int64_t b_stride, float* c,
                    int64_t c_stride, bool add) {
    const int64_t a_bytes = 2 * a_stride, b_bytes = 4 * b_stride, c_bytes = 4 * c_stride;
    float* c_lower = c + SIDE * c_stride;
    asm volatile("" ::: "memory");  // the loads of tile registers do not say that they read memory
    if (add) {
      _tile_loadd(0, c, c_bytes);
      if (RIGHT) _tile_loadd(1, c + SIDE, c_bytes);
      if (LOWER) _tile_loadd(2, c_lower, c_bytes);
      if (LOWER && RIGHT) _tile_loadd(3, c_lower + SIDE, c_bytes);
    } else {
      _tile_zero(0);
      if (RIGHT) _tile_zero(1);
      if (LOWER) _tile_zero(2);
      if (LOWER && RIGHT) _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step += STEPS) {
      const Pair* right = b + step / 2 * b_stride;
      _tile_loadd(4, a + step, a_bytes);
      _tile_loadd(6, right, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (RIGHT) {
        _tile_loadd(7, right + SIDE, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (LOWER) {
        _tile_loadd(5, a + SIDE * a_stride + step, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if (RIGHT) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_bytes);
    if (RIGHT) _tile_stored(1, c + SIDE, c_bytes);
    if (LOWER) _tile_stored(2, c_lower, c_bytes);
    if (LOWER && RIGHT) _tile_stored(3, c_lower + SIDE, c_bytes);
  }
};

}  // namespace prefix_kernels::ISA
