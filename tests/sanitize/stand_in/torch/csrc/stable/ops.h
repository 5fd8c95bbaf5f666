// Operations on tensors, and the parallel loop, with threads that a sanitizer can follow: instrumented OpenMP runtimes are rare.
#pragma once

#include <algorithm>
#include <exception>
#include <thread>

#include "tensor.h"

namespace stand_in {
inline int64_t threads = 1;
}

namespace torch::stable {

inline int64_t get_num_threads() { return stand_in::threads; }

// As at::parallel_for: equal parts, at least `grain` long, the first one in the calling thread; the first exception is passed on.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t n = end - begin, parts = std::max<int64_t>(std::min(stand_in::threads, (n + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1)), 1);
  const int64_t step = (n + parts - 1) / parts;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  auto run = [&](int64_t part) {
    try {
      const int64_t first = begin + part * step, last = std::min(first + step, end);
      if (first < last) f(first, last);
    } catch (...) {
      errors[size_t(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  run(0);
  for (std::thread& other : others) other.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

template <class Sizes>
Tensor new_empty(const Tensor& like, const Sizes& sizes, std::optional<headeronly::ScalarType> type = std::nullopt) {
  auto data = std::make_shared<stand_in::TensorData>();
  data->type = type.value_or(like.scalar_type());
  data->sizes.assign(sizes.begin(), sizes.end());
  data->strides.resize(data->sizes.size());
  int64_t n = 1;
  for (size_t d = data->sizes.size(); d-- > 0; n *= data->sizes[d]) data->strides[d] = n;
  data->storage = std::make_shared<stand_in::Storage>(n * stand_in::size_of(data->type));
  return Tensor(std::move(data));
}

inline Tensor contiguous(const Tensor& t) {
  Tensor copy = new_empty(t, t.get()->sizes);
  const int64_t n = t.numel(), bytes = int64_t(t.element_size());
  const char* from = static_cast<const char*>(t.const_data_ptr());
  char* to = static_cast<char*>(copy.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    int64_t rest = i, at = 0;
    for (int64_t d = t.dim() - 1; d >= 0; rest /= t.size(d--)) at += rest % t.size(d) * t.stride(d);
    std::memcpy(to + i * bytes, from + at * bytes, size_t(bytes));
  }
  return copy;
}

}  // namespace torch::stable
