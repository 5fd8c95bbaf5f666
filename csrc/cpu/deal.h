// Work dealt out to threads piece by piece: whoever is free takes the next, so that none waits for a thread that the system holds up. Only for
// pieces whose results do not depend on who does them, or in which order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace torchprobe::cpu {

// Does pieces 0 … n − 1. make() gives a thread what it works with: something to be called with the number of a piece.
template <class Make>
void deal_out(int64_t n, const Make& make) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, int64_t(torch::stable::get_num_threads()));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto work = make();
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
  });
}

}  // namespace torchprobe::cpu
