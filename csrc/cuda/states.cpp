#include "states.h"

#include "state_arguments.h"

namespace torchprobe::cuda {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

std::mutex& turn() {
  static std::mutex* forever = new std::mutex;  // other threads may still call while the process ends
  return *forever;
}

Tensor observe_read(std::vector<Tensor> states) {
  check_states(states);
  std::array<StableIValue, 2> stack{from(states), from(int64_t(0))};
  const std::lock_guard<std::mutex> hold(turn());
  call("aten::stack", "", stack);
  return to<Tensor>(stack[0]);
}

void observe_take_(std::vector<Tensor> states, Tensor out, bool calls) {
  check_taken(states, out);
  const int64_t slots = states[0].numel(), first = calls ? 0 : layout::CALLS + 1;
  std::vector<Tensor> emptied;
  for (Tensor& state : states) emptied.push_back(torch::stable::narrow(state, 0, first, slots - first));
  std::array<StableIValue, 3> stacked{from(states), from(int64_t(0)), from(out)};
  std::array<StableIValue, 1> zeroed{from(emptied)};
  const std::lock_guard<std::mutex> hold(turn());
  call("aten::stack", "out", stacked);
  to<Tensor>(stacked[0]);  // which is released here
  call("aten::_foreach_zero_", "", zeroed);
}

void observe_merge_(Tensor state, Tensor other) {
  check_pair(state, other, "other", 2);
  std::array<StableIValue, 2> stack{from(state), from(other)};
  const std::lock_guard<std::mutex> hold(turn());
  call("torchprobe::observe_merge_reference_", "", stack);
}

void observe_write_(Tensor state, Tensor other) {
  check_pair(state, other, "new");
  const std::lock_guard<std::mutex> hold(turn());
  torch::stable::copy_(state, other);
}

}  // namespace torchprobe::cuda
