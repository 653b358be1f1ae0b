// Backward pass through the log-sum-exp and output of all keys, so that every tile of keys is on its own:
//
//     p = 2^(s − lse)    δ = Σ_d dout · out − dlse    ds = p ∘ (dout · vᵀ − δ), times 1 − tanh² with a softcap
//     dq = scale · ds · k        dk = scale · dsᵀ · q        dv = pᵀ · dout
//
// One task is a kv head and a part of the sequences. It adds up dk and dv of the part's own keys and, in a buffer of the
// part's own, the gradient of their prefix; parts are summed afterwards in a fixed order.
#include "kernels.h"
#include "tile.h"
#include "unit.h"

namespace prefix_kernels::ISA {

template <typename Unit>
struct BackwardTile {
  typename Unit::Columns q, dout;
  alignas(64) float dq[MAX_DIM][ROWS];
  alignas(64) float delta[ROWS];  // times scale
  // The log-sum-exp in units of log2, as a sum of two floats: a rounding of it would be a relative error of the weights.
  alignas(64) float lse[ROWS], lse_rest[ROWS];
  TileRows rows;
};

// A few tiles of one sequence, and what they need while they meet keys.
template <typename Unit>
struct Backward {
  BackwardTile<Unit> tiles[Unit::OUTER_TILES];
  int tile_count;
  int64_t row_count;
  typename Unit::Rows q_rows, dout_rows;
  typename Unit::Keys keys, values;
  typename Unit::template Weights<false, true> weights;
  typename Unit::template Weights<true, true> dscores;
  alignas(64) float scores[KEYS][ROWS], dweights[KEYS][ROWS], slopes[KEYS][ROWS];
  alignas(64) float q_buffer[ROWS * MAX_DIM], dout_buffer[ROWS * MAX_DIM];
  BiasTile bias;
};

// Where gradients of a segment's keys are added up; null: not wanted.
struct KeySums {
  float *dk, *dv;
  int64_t dk_stride, dv_stride;
};

template <typename Unit>
static void read_tile(const Problem& p, const Gradients& g, Backward<Unit>& b, int tile) {
  BackwardTile<Unit>& t = b.tiles[tile];
  const int vectors = t.rows.vectors();
  read_rows(p.q, t.rows, p.head_dim, b.q_buffer);
  read_rows(g.dout, t.rows, p.value_dim, b.dout_buffer);
  t.q.pack(b.q_buffer, p.head_dim, vectors), b.q_rows.pack(tile, b.q_buffer, p.head_dim, vectors);
  t.dout.pack(b.dout_buffer, p.value_dim, vectors), b.dout_rows.pack(tile, b.dout_buffer, p.value_dim, vectors);
  if (vectors < 2) b.weights.clear(tile), b.dscores.clear(tile);
  std::fill_n(t.dq[0], p.head_dim * ROWS, 0.0f);
  alignas(64) float out[MAX_DIM];
  for (int r = 0; r < ROWS; ++r) {
    t.lse[r] = t.lse_rest[r] = t.delta[r] = 0.0f;
    if (r >= t.rows.count) continue;
    const int64_t at = p.lse_offset(*t.rows.sequence[r], t.rows.query[r], t.rows.head[r]);
    if (p.lse[at] == -INF) continue;  // sees nothing: every score is −inf, every weight 0
    read_row(p.out, row_offset(p.out, t.rows, r), p.value_dim, out);
    double delta = g.dlse ? -g.dlse[at] : 0.0;
    for (int64_t d = 0; d < p.value_dim; d += LANES) delta += sum(load(out + d) * load(b.dout_buffer + r * p.value_dim + d));
    const double lse = p.lse[at] * LOG2E;
    t.lse[r] = float(lse), t.lse_rest[r] = float(lse - t.lse[r]);
    t.delta[r] = float(delta * p.scale);
  }
}

// weights = p and dscores = scale · ds, from scores, `factor` apart from units of log2, and dweights = dout · vᵀ; 0 for the keys
// from `seen` on.
template <typename Unit>
static void differentiate(const Problem& p, Backward<Unit>& b, int tile, int64_t seen, int64_t count, float factor) {
  const BackwardTile<Unit>& t = b.tiles[tile];
  b.weights.start(b.scores, count), b.dscores.start(b.dweights, count);
  for (int u = 0; u < t.rows.vectors(); ++u) {
    const Vec delta = load(t.delta + u * LANES), lse = load(t.lse + u * LANES), rest = load(t.lse_rest + u * LANES);
    const auto weight = [&](int64_t n) {
      const Vec score = load(b.scores[n] + u * LANES) * factor - lse - rest;
      return Unit::exp2(score > 0.0f ? Vec{} : score);  // the lse was rounded, which is much where a bias is large
    };
    const auto dscore = [&](int64_t n, Vec weight) {
      const Vec ds = weight * (load(b.dweights[n] + u * LANES) * float(p.scale) - delta);
      return p.softcap > 0 ? ds * load(b.slopes[n] + u * LANES) : ds;
    };
    for (int64_t n = 0; n < count; n += 2) {
      const bool one = n < seen, two = n + 1 < seen;
      const Vec even = one ? weight(n) : Vec{}, odd = two ? weight(n + 1) : Vec{};
      const Vec ds_even = one ? dscore(n, even) : Vec{}, ds_odd = two ? dscore(n + 1, odd) : Vec{};
      b.weights.put(tile, n, u, even, odd), b.dscores.put(tile, n, u, ds_even, ds_odd);
    }
  }
}

template <typename Unit>
static void meet_keys(const Problem& p, Backward<Unit>& b, const Segment& segment, const KeySums& sums, bool wants_dq) {
  int64_t from = INT32_MAX, to = 0;
  for (int i = 0; i < b.tile_count; ++i)
    from = std::min(from, b.tiles[i].rows.any_from), to = std::max(to, b.tiles[i].rows.any_to);
  for (int64_t first = from; first < to; first += KEYS) {
    const int64_t count = std::min<int64_t>(KEYS, to - first);
    b.keys.read(segment.k, segment.k_first, first, count, p.head_dim);
    b.values.read(segment.v, segment.v_first, first, count, p.value_dim);
    if (wants_dq) b.keys.transpose(count, p.head_dim);
    for (int i = 0; i < b.tile_count; ++i) {
      BackwardTile<Unit>& t = b.tiles[i];
      const int vectors = t.rows.vectors();
      if (t.rows.any_from >= first + count || first >= t.rows.any_to) {
        b.weights.clear(i), b.dscores.clear(i);
        continue;
      }
      const int64_t seen = std::min(count, t.rows.any_to - first);
      Unit::multiply(b.keys, seen, t.q, p.head_dim, vectors, b.scores);
      Unit::multiply(b.values, seen, t.dout, p.value_dim, vectors, b.dweights);
      const float factor = finish_scores(p, t.rows, segment, first, seen, b.bias, b.scores, b.slopes);
      differentiate(p, b, i, seen, count, factor);
      if (wants_dq) Unit::add_weighted(b.keys, count, b.dscores, p.head_dim, vectors, t.dq);
    }
    if (sums.dk)
      Unit::add_outer(b.dscores, count, b.q_rows, b.row_count, p.head_dim, sums.dk + first * sums.dk_stride, sums.dk_stride);
    if (sums.dv)
      Unit::add_outer(b.weights, count, b.dout_rows, b.row_count, p.value_dim, sums.dv + first * sums.dv_stride, sums.dv_stride);
  }
}

template <typename Unit>
static void write_dq(const Problem& p, const Gradients& g, Backward<Unit>& b, const BackwardTile<Unit>& t) {
  transpose_columns(t.dq, p.head_dim, t.rows.vectors(), b.q_buffer);
  for (int r = 0; r < t.rows.count; ++r)
    write_row(g.dq, row_offset(g.dq, t.rows, r), b.q_buffer + r * p.head_dim);
}

static KeySums sums_of(const Problem& p, const Gradients& g, const Sequence& s, int64_t slot, int64_t kv_head, Keys which) {
  if (which == Keys::prefix) {
    const bool further = slot >= p.prefixes;
    const int64_t at = ((further ? slot - p.prefixes : slot) * p.kv_heads + kv_head) * p.prefix_len;
    float *dk = further ? g.further_k : g.dprefix_k, *dv = further ? g.further_v : g.dprefix_v;
    return {g.dprefix_k ? dk + at * p.head_dim : nullptr, g.dprefix_v ? dv + at * p.value_dim : nullptr, p.head_dim, p.value_dim};
  }
  const Sequence& owner = which == Keys::parent ? p.sequences[s.parent] : s;
  auto at = [&](const Strided& of) {
    return of.data ? static_cast<float*>(of.data) + of.offset(owner.row, owner.first_key, kv_head) : nullptr;
  };
  return {at(g.dk), at(g.dv), g.dk.token, g.dv.token};
}

template <typename Unit>
static void backward_with(const Problem& p, const Gradients& g, const Part* parts, int64_t part_count, int64_t begin,
                          int64_t end) {
  [[maybe_unused]] const Unit unit{};
  Backward<Unit>& b = scratch<Backward<Unit>>();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kv_head = task / part_count;
    const Part& part = parts[task % part_count];
    for (int64_t index = 0; index < part.count; ++index) {
      const Sequence& s = p.sequences[part.sequences[index]];
      for (int64_t first = 0; first < s.q_len * p.group(); first += b.row_count) {
        b.row_count = std::min<int64_t>(Unit::OUTER_TILES * ROWS, s.q_len * p.group() - first);
        b.tile_count = int((b.row_count + ROWS - 1) / ROWS);
        for (int i = 0; i < b.tile_count; ++i) {
          b.tiles[i].rows.count = 0;
          b.tiles[i].rows.add(p, s, kv_head, first + i * ROWS);
          read_tile(p, g, b, i);
        }
        for (const Keys which : {Keys::prefix, Keys::parent, Keys::own}) {
          if ((which == Keys::prefix && s.prefix < 0) || (which == Keys::parent && s.parent < 0)) continue;
          const KeySums sums = sums_of(p, g, s, part.slot, kv_head, which);
          if (!g.dq.data && !sums.dk && !sums.dv) continue;
          for (int i = 0; i < b.tile_count; ++i) set_visible(p, b.tiles[i].rows, which);
          meet_keys(p, b, segment_of(p, s, kv_head, which), sums, g.dq.data);
        }
        for (int i = 0; g.dq.data && i < b.tile_count; ++i) write_dq(p, g, b, b.tiles[i]);
      }
    }
  }
}

void backward(const Problem& p, const Gradients& g, const Part* parts, int64_t part_count, int64_t begin, int64_t end) {
  with_unit(p, [&]<typename Unit>() { backward_with<Unit>(p, g, parts, part_count, begin, end); });
}

}  // namespace prefix_kernels::ISA
