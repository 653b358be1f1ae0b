// Forward pass: one task is a tile of query rows of one sequence and kv head. It meets the prefix, a parent's keys and its
// own keys up to the diagonal, in one online softmax:
//
//     s_n = scale · q · k_n     out = Σ_n 2^(s_n − m) · v_n / l     lse = ln 2 · (m + log2 l)
#include "kernels.h"
#include "softmax.h"

namespace prefix_kernels::ISA {

static void write_outputs(const Problem& p, AttendTile& tile) {
  alignas(64) float l[ROWS], m[ROWS];
  for (int u = 0; u < tile.rows.vectors(); ++u) {
    const Vec total = tile.state.l[u];
    store(l + u * LANES, total), store(m + u * LANES, tile.state.m[u]);
    const Vec inverse = total == 0.0f ? Vec{} : 1.0f / total;
    for (int64_t d = 0; d < p.value_dim; ++d) store(tile.acc[d] + u * LANES, load(tile.acc[d] + u * LANES) * inverse);
  }
  transpose_columns(tile.acc, p.value_dim, tile.rows.vectors(), tile.values);
  for (int r = 0; r < tile.rows.count; ++r) {
    write_row(p.out, row_offset(p.out, tile.rows, r), p.value_dim, tile.values + r * p.value_dim);
    const int64_t at = p.lse_offset(*tile.rows.sequence[r], tile.rows.query[r], tile.rows.head[r]);
    p.lse[at] = log_sum_exp(m[r], l[r]);
  }
}

void forward(const Problem& p, const int64_t* tile_first, int64_t begin, int64_t end) {
  AttendTile tile;
  const int64_t tiles = tile_first[p.sequence_count];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t kv_head = task / tiles, index = task % tiles;
    const int64_t sequence = std::upper_bound(tile_first, tile_first + p.sequence_count + 1, index) - tile_first - 1;
    const Sequence& s = p.sequences[sequence];
    tile.rows.count = 0;
    tile.rows.add(p, s, kv_head, (index - tile_first[sequence]) * ROWS);
    tile.start(p);
    for (const Keys which : {Keys::prefix, Keys::parent, Keys::own}) {
      if (which == Keys::prefix && s.prefix < 0) continue;
      if (which == Keys::parent && s.parent < 0) continue;
      set_visible(p, tile.rows, which);
      tile.attend(p, segment_of(p, s, kv_head, which), 0, INT32_MAX);
    }
    write_outputs(p, tile);
  }
}

}  // namespace prefix_kernels::ISA
