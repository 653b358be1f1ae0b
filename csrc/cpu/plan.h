// How the sequences of a call are cut into tasks. No torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "problem.h"

namespace prefix_kernels {

// [sequences + 1]: tiles of `rows` query rows of the sequences before.
inline std::vector<int64_t> count_tiles(const std::vector<Sequence>& sequences, int64_t group, int64_t rows) {
  std::vector<int64_t> first(sequences.size() + 1, 0);
  for (size_t i = 0; i < sequences.size(); ++i) first[i + 1] = first[i] + (sequences[i].q_len * group + rows - 1) / rows;
  return first;
}

// Sequences in the order of their prefix, and the tiles of a decode step: sequences with one prefix, `per_tile` at most.
struct DecodeTiles {
  std::vector<int64_t> order, tile_first;
};

inline DecodeTiles decode_tiles(const std::vector<Sequence>& sequences, int64_t per_tile) {
  DecodeTiles result;
  for (size_t i = 0; i < sequences.size(); ++i) result.order.push_back(int64_t(i));
  auto prefix = [&](int64_t i) { return sequences[i].prefix; };
  std::stable_sort(result.order.begin(), result.order.end(), [&](int64_t a, int64_t b) { return prefix(a) < prefix(b); });
  for (size_t i = 0; i < result.order.size(); ++i)
    if (i == 0 || prefix(result.order[i]) != prefix(result.order[i - 1]) ||
        int64_t(i) - result.tile_first.back() == per_tile)
      result.tile_first.push_back(int64_t(i));
  result.tile_first.push_back(int64_t(result.order.size()));
  return result;
}

// The parts of a backward pass: every part has one prefix, children are with their parent. Parts beyond the first of a
// prefix get slots from `prefixes` on, in order.
struct BackwardParts {
  std::vector<int64_t> order;
  std::vector<Part> parts;
  std::vector<int64_t> prefix_of_slot;  // of every slot
};

inline BackwardParts backward_parts(const std::vector<Sequence>& sequences, int64_t prefixes, int64_t wanted_parts) {
  std::map<int64_t, std::vector<std::vector<int64_t>>> families;  // prefix → root with its children
  std::map<int64_t, std::pair<int64_t, size_t>> family_of_root;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.parent >= 0) {
      const auto [prefix, family] = family_of_root.at(s.parent);
      families[prefix][family].push_back(int64_t(i));
    } else {
      family_of_root[int64_t(i)] = {s.prefix, families[s.prefix].size()};
      families[s.prefix].push_back({int64_t(i)});
    }
  }
  BackwardParts result;
  std::vector<int64_t> first;
  for (int64_t prefix = 0; prefix < prefixes; ++prefix) result.prefix_of_slot.push_back(prefix);
  for (const auto& [prefix, members] : families) {
    const int64_t share = wanted_parts * int64_t(members.size()) / std::max<int64_t>(1, int64_t(sequences.size()));
    const int64_t count = std::clamp<int64_t>(share, 1, int64_t(members.size()));
    for (int64_t part = 0; part < count; ++part) {
      first.push_back(int64_t(result.order.size()));
      for (size_t m = members.size() * part / count; m < members.size() * (part + 1) / count; ++m)
        result.order.insert(result.order.end(), members[m].begin(), members[m].end());
      int64_t slot = prefix;
      if (part > 0 && prefix >= 0) slot = int64_t(result.prefix_of_slot.size()), result.prefix_of_slot.push_back(prefix);
      result.parts.push_back({nullptr, 0, slot});
    }
  }
  first.push_back(int64_t(result.order.size()));
  for (size_t i = 0; i < result.parts.size(); ++i)
    result.parts[i].sequences = result.order.data() + first[i], result.parts[i].count = first[i + 1] - first[i];
  return result;
}

}  // namespace prefix_kernels
