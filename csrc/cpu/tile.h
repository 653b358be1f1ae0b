// A tile of query rows and the keys it meets.
//
// Query rows lie in vector lanes: q is stored transposed, [head_dim][ROWS], scores are [key][ROWS], the accumulator is
// [value_dim][ROWS]. The maximum and the sum over keys then need no work across lanes, and keys and values are read where
// they are. Scores are in units of log2, so that exp2 serves.
#pragma once

#include <algorithm>
#include <limits>

#include "problem.h"
#include "product.h"

namespace prefix_kernels::ISA {

constexpr int ROWS = 2 * LANES;  // query rows of a tile
constexpr int KEYS = 64;         // keys of a tile
constexpr int MAX_DIM = 256;     // head_dim and value_dim; both are multiples of 16

// Which query rows are in a tile; what each may see is set for one segment of keys at a time.
struct TileRows {
  int count = 0;
  const Sequence* sequence[ROWS];
  int64_t query[ROWS], head[ROWS];
  // Row r sees the keys lowest[r] ≤ j < end[r] of the segment. Lanes without a row see none.
  alignas(64) int32_t lowest[ROWS], end[ROWS];
  int64_t all_from, all_to, any_from, any_to;  // keys that every row sees; keys that some row sees

  int vectors() const { return count <= LANES ? 1 : 2; }

  // Adds the rows of a sequence and kv head from `first` on, as far as there is room: query by query, the heads of the
  // group innermost, so that neighbours stand at neighbouring positions.
  void add(const Problem& p, const Sequence& s, int64_t kv_head, int64_t first) {
    const int64_t group = p.group();
    int64_t of_query = first / group, of_group = first % group;
    for (int64_t row = first; row < s.q_len * group && count < ROWS; ++row, ++count) {
      sequence[count] = &s, query[count] = of_query, head[count] = kv_head * group + of_group;
      if (++of_group == group) ++of_query, of_group = 0;
    }
  }
};

// Keys and values of one kind: a prefix, a parent's, or the sequence's own.
struct Segment {
  Strided k, v;
  int64_t k_first, v_first;         // offset of key 0
  int64_t count;                    // keys that exist
  int64_t bias_column;              // that of key 0
  const bool* mask = nullptr;       // [key], true where a key may be attended; null: all
};

enum class Keys { prefix, parent, own };

inline Segment segment_of(const Problem& p, const Sequence& s, int64_t kv_head, Keys which) {
  if (which == Keys::prefix)
    return {p.prefix_k, p.prefix_v, p.prefix_k.offset(s.prefix, 0, kv_head), p.prefix_v.offset(s.prefix, 0, kv_head),
            s.prefix_len, 0};
  const Sequence& owner = which == Keys::parent ? p.sequences[s.parent] : s;
  return {p.k, p.v, p.k.offset(owner.row, owner.first_key, kv_head), p.v.offset(owner.row, owner.first_key, kv_head),
          owner.kv_len, p.prefix_len, p.key_mask ? p.key_mask + owner.row * p.key_mask_row : nullptr};
}

// Sets what each row of the tile may see of its segment `which`.
inline void set_visible(const Problem& p, TileRows& rows, Keys which) {
  rows.all_from = 0, rows.any_to = 0;
  rows.all_to = rows.any_from = INT32_MAX;
  for (int r = 0; r < ROWS; ++r) {
    rows.lowest[r] = rows.end[r] = 0;
    if (r >= rows.count) continue;
    const Sequence& s = *rows.sequence[r];
    const int64_t position = p.causal ? rows.query[r] + s.kv_len - s.q_len : rows.query[r];
    int64_t lowest = 0, end = 0;
    if (which == Keys::prefix) {
      end = s.prefix_len;
      if (p.window && p.first_key_position >= 0)
        lowest = s.prefix_len + p.first_key_position + position - p.window + 1;
    } else if (which == Keys::parent) {
      end = s.parent < 0 ? 0 : p.sequences[s.parent].kv_len;
    } else {
      end = p.causal ? std::min(s.kv_len, position + 1) : s.kv_len;
      if (p.window) {
        lowest = position - p.window + 1;
        if (!p.causal) end = std::min(end, position + p.window);
      }
    }
    end = std::max<int64_t>(end, 0);
    lowest = std::clamp<int64_t>(lowest, 0, end);
    rows.lowest[r] = int32_t(lowest), rows.end[r] = int32_t(end);
    rows.all_from = std::max(rows.all_from, lowest), rows.all_to = std::min(rows.all_to, end);
    if (lowest < end) rows.any_from = std::min(rows.any_from, lowest), rows.any_to = std::max(rows.any_to, end);
  }
}

// scores[key][ROWS] = −inf where a row does not see keys first … first + count of the segment.
inline void hide(const TileRows& rows, const bool* mask, int64_t first, int64_t count, float (*scores)[ROWS]) {
  const bool all_seen = rows.all_from <= first && first + count <= rows.all_to;
  if (all_seen && !mask) return;
  for (int u = 0; u < rows.vectors(); ++u) {
    const IntVec lowest = load(rows.lowest + u * LANES), end = load(rows.end + u * LANES);
    for (int64_t n = 0; n < count; ++n) {
      float* at = scores[n] + u * LANES;
      if (mask && !mask[first + n]) {
        store(at, splat(-INF));
      } else if (!all_seen) {
        const IntVec key = splat(int32_t(first + n));
        store(at, ((key >= lowest) & (key < end)) ? load(at) : splat(-INF));
      }
    }
  }
}

// Asks for keys that will be read soon. With few query rows a kernel waits for memory most of the time, and the
// hardware's own prefetching begins anew at every page.
inline void prefetch(const Strided& from, int64_t offset, int64_t first, int64_t count, int64_t dim) {
  const int64_t size = from.element == Element::float32 ? 4 : 2;
  for (int64_t n = 0; n < count; ++n) {
    const char* row = static_cast<const char*>(from.data) + (offset + (first + n) * from.token) * size;
    for (int64_t byte = 0; byte < dim * size; byte += 64) __builtin_prefetch(row + byte);
  }
}

// Numbers as float32, filled up with zeros to `dim`.
template <typename T>
inline void read_numbers(const T* from, int64_t size, int64_t dim, float* to) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) store(to + d, load(from + d));
  for (; d < dim; d += LANES) store(to + d, load(from + d, size - d));
}

template <typename T>
inline void write_numbers(T* to, int64_t size, const float* from) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) store(to + d, load(from + d));
  if (d < size) store(to + d, load(from + d), size - d);
}

// One query row.
inline void read_row(const Strided& from, int64_t offset, int64_t dim, float* to) {
  if (from.element == Element::float32) read_numbers(static_cast<const float*>(from.data) + offset, from.size, dim, to);
  else if (from.element == Element::bfloat16) read_numbers(static_cast<const bfloat16*>(from.data) + offset, from.size, dim, to);
  else read_numbers(static_cast<const float16*>(from.data) + offset, from.size, dim, to);
}

inline void write_row(const Strided& to, int64_t offset, const float* row) {
  if (to.element == Element::float32) write_numbers(static_cast<float*>(to.data) + offset, to.size, row);
  else if (to.element == Element::bfloat16) write_numbers(static_cast<bfloat16*>(to.data) + offset, to.size, row);
  else write_numbers(static_cast<float16*>(to.data) + offset, to.size, row);
}

inline int64_t row_offset(const Strided& of, const TileRows& rows, int r) {
  const Sequence& s = *rows.sequence[r];
  return of.offset(s.row, s.first_query + rows.query[r], rows.head[r]);
}

// to[dim][ROWS] = `vectors` · LANES rows of `from` [ROWS][dim]
inline void transpose_rows(const float* from, int64_t dim, int vectors, float (*to)[ROWS]) {
  for (int u = 0; u < vectors; ++u)
    for (int64_t d = 0; d < dim; d += LANES) {
      Vec block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = load(from + (u * LANES + i) * dim + d);
      transpose(block);
      for (int i = 0; i < LANES; ++i) store(to[d + i] + u * LANES, block[i]);
    }
}

// `vectors` · LANES rows of to[ROWS][dim] = from[dim][ROWS]
inline void transpose_columns(const float (*from)[ROWS], int64_t dim, int vectors, float* to) {
  for (int u = 0; u < vectors; ++u)
    for (int64_t d = 0; d < dim; d += LANES) {
      Vec block[LANES];
      for (int i = 0; i < LANES; ++i) block[i] = load(from[d + i] + u * LANES);
      transpose(block);
      for (int i = 0; i < LANES; ++i) store(to + (u * LANES + i) * dim + d, block[i]);
    }
}

// buffer[ROWS][dim] = the tile's rows of `from`, as float32; the rest of the last vector of rows is 0.
inline void read_rows(const Strided& from, const TileRows& rows, int64_t dim, float* buffer) {
  for (int r = 0; r < rows.vectors() * LANES; ++r) {
    if (r < rows.count) read_row(from, row_offset(from, rows, r), dim, buffer + r * dim);
    else std::fill_n(buffer + r * dim, dim, 0.0f);
  }
}

// What turns a product q · k into a score in units of log2: c · tanh(product · inner) · log2 e with a softcap c, or
// product · outer.
struct ScoreFactors {
  static constexpr double LARGEST = std::numeric_limits<float>::max();
  float inner, outer;
  bool softcap;
  explicit ScoreFactors(const Problem& p)
      : inner(p.softcap > 0 ? float(std::clamp(p.scale / p.softcap, -LARGEST, LARGEST)) : 1.0f),
        outer(float((p.softcap > 0 ? p.softcap : p.scale) * LOG2E)), softcap(p.softcap > 0) {}
};

// The bias of row r and LANES keys from `key` on; 0 past `end`.
inline Vec bias_of(const Problem& p, const TileRows& rows, int r, const Segment& segment, int64_t key, int64_t end) {
  const int64_t at = row_offset(p.bias, rows, r) + segment.bias_column + key;
  const auto read = [&](const auto* from) { return key + LANES <= end ? load(from) : load(from, end - key); };
  if (p.bias.element == Element::float32) return read(static_cast<const float*>(p.bias.data) + at);
  if (p.bias.element == Element::float16) return read(static_cast<const float16*>(p.bias.data) + at);
  return read(static_cast<const bfloat16*>(p.bias.data) + at);
}

struct BiasTile {
  alignas(64) float of_row[ROWS * KEYS], of_key[KEYS][ROWS];

  // of_key[count][ROWS] = the tile's bias for keys first … first + count of the segment.
  void read(const Problem& p, const TileRows& rows, const Segment& segment, int64_t first, int64_t count) {
    const int64_t width = (count + LANES - 1) / LANES * LANES;
    for (int r = 0; r < rows.vectors() * LANES; ++r)
      for (int64_t n = 0; n < width; n += LANES) {
        const bool is_row = r < rows.count;
        store(of_row + r * width + n, is_row ? bias_of(p, rows, r, segment, first + n, first + count) : Vec{});
      }
    transpose_rows(of_row, width, rows.vectors(), of_key);
  }
};

// Products of queries with a tile of keys become scores[count][ROWS] of units of log2 by the factor that is returned; −inf where
// hidden. With a softcap, `slopes` (unless null) becomes its derivative 1 − tanh² at each score. `bias` is written where the
// problem has one.
inline float finish_scores(const Problem& p, const TileRows& rows, const Segment& segment, int64_t first, int64_t count,
                           BiasTile& bias, float (*scores)[ROWS], float (*slopes)[ROWS]) {
  const ScoreFactors factors(p);
  const bool biased = p.bias.data, as_they_are = !biased && !factors.softcap && factors.outer > 0.0f;
  if (biased) bias.read(p, rows, segment, first, count);
  for (int u = 0; u < rows.vectors() && !as_they_are; ++u)
    for (int64_t n = 0; n < count; ++n) {
      float* at = scores[n] + u * LANES;
      Vec s = load(at);
      if (factors.softcap) {
        s = tanh(s * factors.inner);
        if (slopes) store(slopes[n] + u * LANES, 1.0f - s * s);
      }
      s *= factors.outer;
      if (biased) s += load(bias.of_key[n] + u * LANES) * float(LOG2E);
      store(at, s);
    }
  hide(rows, segment.mask, first, count, scores);
  return as_they_are ? factors.outer : 1.0f;
}

}  // namespace prefix_kernels::ISA
