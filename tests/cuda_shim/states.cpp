// csrc/cuda/states.cpp as operators for the host: what they do to states, and that they wait for their turn.

#include "cuda/states.cpp"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <chrono>
#include <thread>

namespace {

// Holds the turn for some milliseconds, as the launches of a call do. `note` says that another thread has ended something; how many did so
// meanwhile is `ended`, which is −1 as soon as they may begin.
std::atomic<int64_t> noted{0};
void hold(int64_t milliseconds, torch::stable::Tensor ended) {
  const std::lock_guard<std::mutex> mine(torchprobe::cuda::turn());
  const int64_t before = noted;
  auto* said = static_cast<std::atomic<int64_t>*>(ended.mutable_data_ptr());
  *said = -1;
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  *said = noted - before;
}
void note() { ++noted; }

}  // namespace

STABLE_TORCH_LIBRARY(SHIM, m) {
  m.def("observe_read(Tensor[] states) -> Tensor");
  m.def("observe_take_(Tensor(a!)[] states, Tensor(b!) out, bool calls=False) -> ()");
  m.def("observe_merge_(Tensor(a!) state, Tensor other) -> ()");
  m.def("observe_write_(Tensor(a!) state, Tensor new) -> ()");
  m.def("hold(int milliseconds, Tensor(a!) ended) -> ()");
  m.def("note() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(SHIM, CompositeExplicitAutograd, m) {
  m.impl("observe_read", TORCH_BOX(&torchprobe::cuda::observe_read));
  m.impl("observe_take_", TORCH_BOX(&torchprobe::cuda::observe_take_));
  m.impl("observe_merge_", TORCH_BOX(&torchprobe::cuda::observe_merge_));
  m.impl("observe_write_", TORCH_BOX(&torchprobe::cuda::observe_write_));
  m.impl("hold", TORCH_BOX(&hold));
  m.impl("note", TORCH_BOX(&note));
}
