// Forward pass: one task is a tile of query rows of one sequence and kv head; a few go together. It meets the prefix, a parent's
// keys and its own keys up to the diagonal, in one online softmax:
//
//     s_n = scale · q · k_n     out = Σ_n 2^(s_n − m) · v_n / l     lse = ln 2 · (m + log2 l)
#include "kernels.h"
#include "softmax.h"
#include "unit.h"

#include <array>

namespace prefix_kernels::ISA {

template <typename Unit>
static void write_outputs(const Problem& p, AttendTile<Unit>& tile, float* buffer) {
  alignas(64) float l[ROWS], m[ROWS];
  for (int u = 0; u < tile.rows.vectors(); ++u) {
    const Vec total = tile.state.l[u];
    store(l + u * LANES, total), store(m + u * LANES, tile.state.m[u]);
    const Vec inverse = total == 0.0f ? Vec{} : 1.0f / total;
    for (int64_t d = 0; d < p.value_dim; ++d) store(tile.acc[d] + u * LANES, load(tile.acc[d] + u * LANES) * inverse);
  }
  transpose_columns(tile.acc, p.value_dim, tile.rows.vectors(), buffer);
  for (int r = 0; r < tile.rows.count; ++r) {
    write_row(p.out, row_offset(p.out, tile.rows, r), buffer + r * p.value_dim);
    if (!p.lse) continue;
    p.lse[p.lse_offset(*tile.rows.sequence[r], tile.rows.query[r], tile.rows.head[r])] = log_sum_exp(m[r], l[r]);
  }
}

template <typename Unit>
static void forward_with(const Problem& p, const int64_t* tile_first, int64_t begin, int64_t end) {
  [[maybe_unused]] const Unit unit{};
  Attend<Unit>& attend = scratch<Attend<Unit>>();
  auto& tiles = scratch<std::array<AttendTile<Unit>, GROUP>>();
  int64_t sequence = 0;
  for (int64_t task = begin; task < end;) {
    while (tile_first[sequence + 1] * p.kv_heads <= task) ++sequence;
    const Sequence& s = p.sequences[sequence];
    const int64_t of_sequence = tile_first[sequence + 1] - tile_first[sequence];
    const int64_t index = task - tile_first[sequence] * p.kv_heads, kv_head = index / of_sequence, tile = index % of_sequence;
    const int64_t count = std::min({GROUP, end - task, of_sequence - tile});
    for (int64_t i = 0; i < count; ++i) {
      tiles[i].rows.count = 0;
      tiles[i].rows.add(p, s, kv_head, (tile + i) * ROWS);
      attend.start(p, tiles[i]);
    }
    for (const Keys which : {Keys::prefix, Keys::parent, Keys::own}) {
      if (which == Keys::prefix && s.prefix < 0) continue;
      if (which == Keys::parent && s.parent < 0) continue;
      for (int64_t i = 0; i < count; ++i) set_visible(p, tiles[i].rows, which);
      attend.attend(p, tiles.data(), count, segment_of(p, s, kv_head, which), 0, INT32_MAX);
    }
    for (int64_t i = 0; i < count; ++i) write_outputs(p, tiles[i], attend.buffer);
    task += count;
  }
}

void forward(const Problem& p, const int64_t* tile_first, int64_t begin, int64_t end) {
  with_unit(p, [&]<typename Unit>() { forward_with<Unit>(p, tile_first, begin, end); });
}

}  // namespace prefix_kernels::ISA
