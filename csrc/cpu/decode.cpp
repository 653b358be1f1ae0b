// Few query rows per sequence (decoding): the prefix is read once for the rows of many sequences, then each sequence meets
// its own keys. Two passes over the same online softmax:
//
//     decode_prefix   tiles of rows of several sequences × ranges of prefix columns → partial (accumulator, m, l)
//     decode_own      a sequence's own keys, and its partial results merged → out, lse
//
// Where no sequences share a prefix and it is not cut (no splits), decode_own meets it as well.
//
// With too few rows to fill vector lanes, lanes hold head_dim instead.
#include "kernels.h"
#include "pairs.h"
#include "softmax.h"
#include "unit.h"

namespace prefix_kernels::ISA {

// Few rows, each with its own accumulator along value_dim.
struct NarrowTile {
  alignas(64) float q[ROWS * MAX_DIM], acc[ROWS * MAX_DIM];
  alignas(64) float weights[ROWS][KEYS];
  VectorUnit::Keys keys;
  alignas(64) bfloat16 first_q[MAX_DIM];  // row 0 of q, where that is bfloat16
  float m[ROWS], l[ROWS];
  TileRows rows;

  void start(const Problem& p) {
    read_rows(p.q, rows, p.head_dim, q);
    if (p.q.element == Element::bfloat16) write_numbers(first_q, p.head_dim, q);
    std::fill_n(acc, rows.count * p.value_dim, 0.0f);
    std::fill_n(m, ROWS, -INF), std::fill_n(l, ROWS, 0.0f);
  }

  // Keys first … last of a segment; the visible ranges must be set for it.
  void attend(const Problem& p, const Segment& segment, int64_t first, int64_t last) {
    first = std::max(first, rows.any_from), last = std::min(last, rows.any_to);
    for (; first < last; first += KEYS) {
      const int64_t count = std::min<int64_t>(KEYS, last - first), next = first + KEYS;
      prefetch(segment.v, segment.v_first, first, count, p.value_dim);
      if (segment.k.element == Element::float32) {
        attend_in_place<float>(p, segment, first, count);
      } else if (rows.count > 1) {  // widened once for all
        keys.read(segment.k, segment.k_first, first, count, p.head_dim);
        weigh(p, segment, keys.data, keys.stride, p.head_dim, first, count);
        keys.read(segment.v, segment.v_first, first, count, p.value_dim);
        add_values(p, keys.data, keys.stride, p.value_dim, count);
      } else if (segment.k.element == Element::bfloat16) {
        attend_bfloat16(p, segment, first, count);
      } else {
        attend_in_place<float16>(p, segment, first, count);
      }
      prefetch(segment.k, segment.k_first, next, std::min<int64_t>(KEYS, last - next), p.head_dim);
    }
  }

  // Goes on from another tile's partial result for row r.
  void merge(const Problem& p, int r, const float* other_acc, float other_m, float other_l) {
    const float m_new = other_m > m[r] ? other_m : m[r], base = m_new == -INF ? 0.0f : m_new;
    const float mine = exp2(splat(m[r] - base))[0], others = exp2(splat(other_m - base))[0];
    for (int64_t d = 0; d < p.value_dim; d += LANES) {
      float* at = acc + r * p.value_dim + d;
      store(at, load(at) * mine + load(other_acc + d) * others);
    }
    m[r] = m_new, l[r] = l[r] * mine + other_l * others;
  }

 private:
  template <typename T>
  static const T* numbers(const Strided& of, int64_t offset, int64_t first) {
    return static_cast<const T*>(of.data) + offset + first * of.token;
  }

  template <typename T>
  void attend_in_place(const Problem& p, const Segment& segment, int64_t first, int64_t count) {
    weigh(p, segment, numbers<T>(segment.k, segment.k_first, first), segment.k.token, segment.k.size, first, count);
    add_values(p, numbers<T>(segment.v, segment.v_first, first), segment.v.token, segment.v.size, count);
  }

  // A single row; keys in bfloat16 have queries in it.
  void attend_bfloat16(const Problem& p, const Segment& segment, int64_t first, int64_t count) {
#if defined(__AVX512BF16__)
    const bfloat16* k = numbers<bfloat16>(segment.k, segment.k_first, first);
    weigh_row(p, segment, 0, first, count, [&](int64_t n, auto keys) {
      return dot_pairs(k + n * segment.k.token, segment.k.token, keys, first_q, segment.k.size);
    });
    const bfloat16* v = numbers<bfloat16>(segment.v, segment.v_first, first);
    add_value_pairs(v, segment.v.token, segment.v.size, count, weights[0], acc);
#else
    attend_in_place<bfloat16>(p, segment, first, count);
#endif
  }

  // `dim` numbers of each key are read; where that is less than head_dim the queries' others are 0.
  template <typename T>
  void weigh(const Problem& p, const Segment& segment, const T* k, int64_t stride, int64_t dim, int64_t first, int64_t count) {
    for (int r = 0; r < rows.count; ++r)
      weigh_row(p, segment, r, first, count, [&](int64_t n, auto keys) {
        return dot(k + n * stride, stride, keys, q + r * p.head_dim, dim);
      });
  }

  template <typename T>
  void add_values(const Problem& p, const T* v, int64_t stride, int64_t dim, int64_t count) {
    product_columns<Left::rows>(rows.count, dim, weights[0], KEYS, v, stride, acc, p.value_dim, count, true);
  }

  // Scores of one row with `count` keys, as weights 2^(s − m'). products(n, keys) are those with keys n … n + keys.
  template <typename Products>
  void weigh_row(const Problem& p, const Segment& segment, int r, int64_t first, int64_t count, const Products& products) {
    float* w = weights[r];
    Vec top = splat(m[r]);
    const auto score = [&](int64_t n, auto keys) {
      const Vec s = visible(p, segment, r, products(n, keys), first + n, first + count);
      store(w + n, s);
      top = max(top, s);
    };
    int64_t n = 0;
    for (; n + LANES <= count; n += LANES) score(n, std::integral_constant<int64_t, LANES>());
    if (n < count) score(n, count - n);
    const float m_new = largest(top);
    const float base = m_new == -INF ? 0.0f : m_new, alpha = exp2(splat(m[r] - base))[0];
    Vec total = {};
    for (int64_t n = 0; n < count; n += LANES) {
      const Vec weight = exp2(load(w + n) - base);
      store(w + n, weight);
      total += weight;
    }
    m[r] = m_new, l[r] = l[r] * alpha + float(sum(total));
    for (int64_t d = 0; d < p.value_dim; d += LANES)
      store(acc + r * p.value_dim + d, load(acc + r * p.value_dim + d) * alpha);
  }

  // One row's products with LANES keys, a key in each lane; 0 past `count`.
  template <typename T, typename Count>
  static Vec dot(const T* keys, int64_t stride, Count count, const float* row, int64_t dim) {
    Vec parts[LANES] = {};
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
      const Vec q = load(row + d);
      for (int64_t i = 0; i < count; ++i) parts[i] += load(keys + i * stride + d) * q;
    }
    if (d < dim) {
      const Vec q = load(row + d);
      for (int64_t i = 0; i < count; ++i) parts[i] += load(keys + i * stride + d, dim - d) * q;
    }
    return fold(parts);
  }

  // Scale, softcap and bias, and −inf where row r does not see keys key … key + LANES or there is no key.
  Vec visible(const Problem& p, const Segment& segment, int r, Vec s, int64_t key, int64_t keys_end) const {
    const bool* mask = segment.mask;
    const ScoreFactors factors(p);
    s = (factors.softcap ? tanh(s * factors.inner) : s) * factors.outer;
    if (p.bias.data) s += bias_of(p, rows, r, segment, key, keys_end) * float(LOG2E);
    const int64_t end = std::min<int64_t>(rows.end[r], keys_end);
    if (!mask && rows.lowest[r] <= key && key + LANES <= end) return s;
    for (int lane = 0; lane < LANES; ++lane) {
      const int64_t j = key + lane;
      if (j < rows.lowest[r] || j >= end || (mask && !mask[j])) s[lane] = -INF;
    }
    return s;
  }
};

static float* partial_of(const Problem& p, const DecodePlan& plan, int64_t split, const TileRows& rows, int r) {
  const int64_t sequence = rows.sequence[r] - p.sequences;
  const int64_t row = ((split * p.sequence_count + sequence) * p.heads + rows.head[r]) * plan.max_q_len + rows.query[r];
  return plan.partial + row * (p.value_dim + 2);
}

static void write_partial(const Problem& p, const DecodePlan& plan, int64_t split, const TileRows& rows, const float* acc,
                          const float* m, const float* l) {
  for (int r = 0; r < rows.count; ++r) {
    float* to = partial_of(p, plan, split, rows, r);
    std::memcpy(to, acc + r * p.value_dim, p.value_dim * sizeof(float));
    to[p.value_dim] = m[r], to[p.value_dim + 1] = l[r];
  }
}

template <typename Unit>
static void decode_prefix_with(const Problem& p, const DecodePlan& plan, int64_t begin, int64_t end) {
  [[maybe_unused]] const Unit unit{};
  Attend<Unit>& attend = scratch<Attend<Unit>>();
  AttendTile<Unit>& wide = scratch<AttendTile<Unit>>();
  NarrowTile& narrow = scratch<NarrowTile>();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t split = task % plan.splits, tile = task / plan.splits % plan.tiles, kv_head = task / plan.splits / plan.tiles;
    TileRows rows;
    for (int64_t i = plan.tile_first[tile]; i < plan.tile_first[tile + 1]; ++i)
      rows.add(p, p.sequences[plan.order[i]], kv_head, 0);
    if (rows.count == 0 || rows.sequence[0]->prefix < 0) continue;
    set_visible(p, rows, Keys::prefix);
    const Segment prefix = segment_of(p, *rows.sequence[0], kv_head, Keys::prefix);
    const int64_t first = split * plan.split_len, last = first + plan.split_len;
    if (!Unit::fills_tile(rows.count, p.head_dim)) {
      narrow.rows = rows;
      narrow.start(p);
      narrow.attend(p, prefix, first, last);
      write_partial(p, plan, split, rows, narrow.acc, narrow.m, narrow.l);
    } else {
      wide.rows = rows;
      attend.start(p, wide);
      attend.attend(p, &wide, 1, prefix, first, last);
      alignas(64) float m[ROWS], l[ROWS];
      for (int u = 0; u < 2; ++u) store(m + u * LANES, wide.state.m[u]), store(l + u * LANES, wide.state.l[u]);
      transpose_columns(wide.acc, p.value_dim, rows.vectors(), attend.buffer);
      write_partial(p, plan, split, rows, attend.buffer, m, l);
    }
  }
}

void decode_prefix(const Problem& p, const DecodePlan& plan, int64_t begin, int64_t end) {
  with_unit(p, [&]<typename Unit>() { decode_prefix_with<Unit>(p, plan, begin, end); });
}

template <typename Unit>
static void decode_own_with(const Problem& p, const DecodePlan& plan, int64_t begin, int64_t end) {
  [[maybe_unused]] const Unit unit{};
  Attend<Unit>& attend = scratch<Attend<Unit>>();
  AttendTile<Unit>& wide = scratch<AttendTile<Unit>>();
  NarrowTile& tile = scratch<NarrowTile>();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kv_head = task % p.kv_heads;
    const Sequence& s = p.sequences[task / p.kv_heads];
    tile.rows.count = 0;
    tile.rows.add(p, s, kv_head, 0);
    const auto meet = [&](TileRows& rows, const auto& attend_to) {
      for (const Keys which : {Keys::prefix, Keys::parent, Keys::own}) {
        if (which == Keys::prefix && (s.prefix < 0 || plan.splits > 0)) continue;
        if (which == Keys::parent && s.parent < 0) continue;
        set_visible(p, rows, which);
        attend_to(segment_of(p, s, kv_head, which));
      }
    };
    if (Unit::fills_tile(tile.rows.count, p.head_dim)) {
      wide.rows = tile.rows;
      attend.start(p, wide);
      meet(wide.rows, [&](const Segment& segment) { attend.attend(p, &wide, 1, segment, 0, INT32_MAX); });
      for (int u = 0; u < 2; ++u) store(tile.m + u * LANES, wide.state.m[u]), store(tile.l + u * LANES, wide.state.l[u]);
      transpose_columns(wide.acc, p.value_dim, wide.rows.vectors(), tile.acc);
    } else {
      tile.start(p);
      meet(tile.rows, [&](const Segment& segment) { tile.attend(p, segment, 0, INT32_MAX); });
    }
    for (int64_t split = 0; s.prefix >= 0 && split < plan.splits; ++split)
      for (int r = 0; r < tile.rows.count; ++r) {
        const float* from = partial_of(p, plan, split, tile.rows, r);
        tile.merge(p, r, from, from[p.value_dim], from[p.value_dim + 1]);
      }
    if (task + 1 < end) {
      const Sequence& next = p.sequences[(task + 1) / p.kv_heads];
      const Segment own = segment_of(p, next, (task + 1) % p.kv_heads, Keys::own);
      prefetch(own.k, own.k_first, 0, std::min<int64_t>(KEYS, next.kv_len), p.head_dim);
    }
    for (int r = 0; r < tile.rows.count; ++r) {
      float* acc = tile.acc + r * p.value_dim;
      const float inverse = tile.l[r] == 0.0f ? 0.0f : 1.0f / tile.l[r];
      for (int64_t d = 0; d < p.value_dim; d += LANES) store(acc + d, load(acc + d) * inverse);
      write_row(p.out, row_offset(p.out, tile.rows, r), acc);
      if (p.lse) p.lse[p.lse_offset(s, tile.rows.query[r], tile.rows.head[r])] = log_sum_exp(tile.m[r], tile.l[r]);
    }
  }
}

void decode_own(const Problem& p, const DecodePlan& plan, int64_t begin, int64_t end) {
  with_unit(p, [&]<typename Unit>() { decode_own_with<Unit>(p, plan, begin, end); });
}

}  // namespace prefix_kernels::ISA
