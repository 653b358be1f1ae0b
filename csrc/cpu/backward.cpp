// Backward pass through the log-sum-exp and output of all keys, so that every tile of keys is on its own:
//
//     p = 2^(s − lse)    δ = Σ_d dout · out − dlse    ds = p ∘ (dout · vᵀ − δ), times 1 − tanh² with a softcap
//     dq = scale · ds · k        dk = scale · dsᵀ · q        dv = pᵀ · dout
//
// One task is a kv head and a part of the sequences. It adds up dk and dv of the part's own keys and, in a buffer of the
// part's own, the gradient of their prefix; parts are summed afterwards in a fixed order.
#include "kernels.h"
#include "tile.h"

namespace prefix_kernels::ISA {

struct BackwardTile {
  alignas(64) float q[MAX_DIM][ROWS], dout[MAX_DIM][ROWS], dq[MAX_DIM][ROWS];
  alignas(64) float q_rows[ROWS * MAX_DIM], dout_rows[ROWS * MAX_DIM];  // q_rows times scale
  alignas(64) float weights[KEYS][ROWS], dscores[KEYS][ROWS], slopes[KEYS][ROWS];
  alignas(64) float keys[KEYS * MAX_DIM], values[KEYS * MAX_DIM];
  alignas(64) float delta[ROWS];
  Shift lse;
  BiasTile bias;
  TileRows rows;
};

// Where gradients of a segment's keys are added up; null: not wanted.
struct KeySums {
  float *dk, *dv;
  int64_t dk_stride, dv_stride;
};

static void read_tile(const Problem& p, const Gradients& g, BackwardTile& t) {
  read_rows(p.q, t.rows, p.head_dim, t.q_rows);
  transpose_rows(t.q_rows, p.head_dim, t.rows.vectors(), t.q);
  for (int64_t i = 0; i < t.rows.count * p.head_dim; i += LANES) store(t.q_rows + i, load(t.q_rows + i) * float(p.scale));
  read_rows(g.dout, t.rows, p.value_dim, t.dout_rows);
  transpose_rows(t.dout_rows, p.value_dim, t.rows.vectors(), t.dout);
  std::fill_n(t.dq[0], p.head_dim * ROWS, 0.0f);
  alignas(64) float out[MAX_DIM];
  for (int r = 0; r < ROWS; ++r) {
    t.lse.most[r] = t.lse.rest[r] = t.delta[r] = 0.0f;
    if (r >= t.rows.count) continue;
    const int64_t at = p.lse_offset(*t.rows.sequence[r], t.rows.query[r], t.rows.head[r]);
    if (p.lse[at] == -INF) continue;  // sees nothing: every score is −inf, every weight 0
    read_row(p.out, row_offset(p.out, t.rows, r), p.value_dim, out);
    double delta = g.dlse ? -g.dlse[at] : 0.0;
    for (int64_t d = 0; d < p.value_dim; d += LANES) delta += sum(load(out + d) * load(t.dout_rows + r * p.value_dim + d));
    const double lse = p.lse[at] * LOG2E;
    t.lse.most[r] = float(lse), t.lse.rest[r] = float(lse - t.lse.most[r]);
    t.delta[r] = float(delta);
  }
}

// weights[count][ROWS] = p and dscores[count][ROWS] = ds, from s − lse and dout · vᵀ in the same places.
static void differentiate(const Problem& p, BackwardTile& t, int64_t count) {
  for (int u = 0; u < t.rows.vectors(); ++u) {
    const Vec delta = load(t.delta + u * LANES);
    for (int64_t n = 0; n < count; ++n) {
      const Vec score = load(t.weights[n] + u * LANES);  // less the lse, whose rounding is large where a bias is
      const Vec weight = exp2(score > 0.0f ? Vec{} : score);
      Vec ds = weight * (load(t.dscores[n] + u * LANES) - delta);
      if (p.softcap > 0) ds *= load(t.slopes[n] + u * LANES);
      store(t.weights[n] + u * LANES, weight), store(t.dscores[n] + u * LANES, ds);
    }
  }
}

template <int VECTORS>
static void meet_keys(const Problem& p, BackwardTile& t, const Segment& segment, const KeySums& sums, bool wants_dq) {
  for (int64_t first = t.rows.any_from; first < t.rows.any_to; first += KEYS) {
    const int64_t count = std::min<int64_t>(KEYS, t.rows.any_to - first);
    const KeyTile k = widen(segment.k, segment.k_first, first, count, p.head_dim, t.keys);
    const KeyTile v = widen(segment.v, segment.v_first, first, count, p.value_dim, t.values);
    compute_scores(p, t.rows, segment, first, count, k, t.q, t.lse, t.bias, t.weights, t.slopes);
    product<VECTORS, Left::rows>(count, v.data, v.stride, t.dout[0], ROWS, t.dscores[0], ROWS, p.value_dim, false);
    differentiate(p, t, count);
    if (wants_dq)
      product<VECTORS, Left::columns>(p.head_dim, k.data, k.stride, t.dscores[0], ROWS, t.dq[0], ROWS, count, true);
    if (sums.dk)
      product_columns<Left::rows>(count, p.head_dim, t.dscores[0], ROWS, t.q_rows, p.head_dim,
                                  sums.dk + first * sums.dk_stride, sums.dk_stride, t.rows.count, true);
    if (sums.dv)
      product_columns<Left::rows>(count, p.value_dim, t.weights[0], ROWS, t.dout_rows, p.value_dim,
                                  sums.dv + first * sums.dv_stride, sums.dv_stride, t.rows.count, true);
  }
}

static void write_dq(const Problem& p, const Gradients& g, BackwardTile& t) {
  for (int64_t d = 0; d < p.head_dim; ++d)
    for (int u = 0; u < t.rows.vectors(); ++u) store(t.dq[d] + u * LANES, load(t.dq[d] + u * LANES) * float(p.scale));
  transpose_columns(t.dq, p.head_dim, t.rows.vectors(), t.q_rows);
  for (int r = 0; r < t.rows.count; ++r)
    write_row(g.dq, row_offset(g.dq, t.rows, r), p.head_dim, t.q_rows + r * p.head_dim);
}

static KeySums sums_of(const Problem& p, const Gradients& g, const Sequence& s, int64_t slot, int64_t kv_head, Keys which) {
  if (which == Keys::prefix) {
    const int64_t at = (slot * p.kv_heads + kv_head) * p.prefix_len;
    return {g.dprefix_k ? g.dprefix_k + at * p.head_dim : nullptr, g.dprefix_v ? g.dprefix_v + at * p.value_dim : nullptr,
            p.head_dim, p.value_dim};
  }
  const Sequence& owner = which == Keys::parent ? p.sequences[s.parent] : s;
  auto at = [&](const Strided& of) {
    return of.data ? static_cast<float*>(of.data) + of.offset(owner.row, owner.first_key, kv_head) : nullptr;
  };
  return {at(g.dk), at(g.dv), g.dk.token, g.dv.token};
}

void backward(const Problem& p, const Gradients& g, const Part* parts, int64_t part_count, int64_t begin, int64_t end) {
  BackwardTile t;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kv_head = task / part_count;
    const Part& part = parts[task % part_count];
    for (int64_t index = 0; index < part.count; ++index) {
      const Sequence& s = p.sequences[part.sequences[index]];
      for (int64_t first = 0; first < s.q_len * p.group(); first += ROWS) {
        t.rows.count = 0;
        t.rows.add(p, s, kv_head, first);
        read_tile(p, g, t);
        for (const Keys which : {Keys::prefix, Keys::parent, Keys::own}) {
          if ((which == Keys::prefix && s.prefix < 0) || (which == Keys::parent && s.parent < 0)) continue;
          const KeySums sums = sums_of(p, g, s, part.slot, kv_head, which);
          if (!g.dq.data && !sums.dk && !sums.dv) continue;
          set_visible(p, t.rows, which);
          const Segment segment = segment_of(p, s, kv_head, which);
          if (t.rows.vectors() == 2) meet_keys<2>(p, t, segment, sums, g.dq.data);
          else meet_keys<1>(p, t, segment, sums, g.dq.data);
        }
        if (g.dq.data) write_dq(p, g, t);
      }
    }
  }
}

}  // namespace prefix_kernels::ISA
