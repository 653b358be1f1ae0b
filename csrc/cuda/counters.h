// Which of a device's counters a call takes. Plain C++.
#pragma once

#include <cstdint>
#include <map>

namespace prefix_kernels::cuda {

class CounterRanges {
 public:
  explicit CounterRanges(int64_t counters) : counters_(counters) {}

  // The first of `count` counters, or −1 where none are left. The calls of a stream run one after the other and share a range. A
  // captured call has one of its own for ever: its graph may be replayed on any stream, beside any call.
  int64_t take(const void* stream, bool captured, int64_t count) {
    if (captured) return add(count);
    Range& range = of_stream_[stream];
    if (range.count >= count) return range.first;
    int64_t rounded = LEAST;  // a batch that grows takes a new range now and then alone
    while (rounded < count) rounded *= 2;
    const int64_t first = add(rounded);
    if (first >= 0) range = {first, rounded};
    return first;
  }

 private:
  static constexpr int64_t LEAST = 1024;
  struct Range {
    int64_t first = 0, count = 0;
  };

  int64_t add(int64_t count) {
    if (count > counters_ - taken_) return -1;
    taken_ += count;
    return taken_ - count;
  }

  int64_t counters_, taken_ = 0;
  std::map<const void*, Range> of_stream_;
};

}  // namespace prefix_kernels::cuda
