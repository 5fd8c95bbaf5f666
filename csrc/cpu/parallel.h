// Parallel loops. Every thread computes in the same way, whatever float mode it has.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "float_mode.h"

namespace torchprobe::cpu {

// PyTorch's parallel_for.
template <class F>
void parallel(int64_t begin, int64_t end, int64_t grain, const F& f) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const EveryNumber exact;  // a thread inherits the mode of the one that started it
    f(first, last);
  });
}

// A dynamic schedule, for work that PyTorch's static schedule would spread unevenly. Runs items 0 … n − 1. Each thread calls make() once and then calls the result with the number of an item. A free thread takes the next item,
// so no thread waits for another that the system has paused. Use it only where results depend neither on the thread nor on the order.
template <class Make>
void parallel_dynamic(int64_t n, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, int64_t(torch::stable::get_num_threads()));
  parallel(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  });
}

}  // namespace torchprobe::cpu
