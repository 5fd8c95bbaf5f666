// Whole states of observe_ on the CPU: read, taken, merged and replaced, each in one step for all threads that observe meanwhile.
// torchprobe/ops/states.py defines the schemas and explains them:
//
//   observe_read(Tensor[] states) -> Tensor
//   observe_take_(Tensor(a!)[] states, Tensor(b!) out, bool calls=False) -> ()
//   observe_merge_(Tensor(a!) state, Tensor other) -> ()
//   observe_write_(Tensor(a!) state, Tensor new) -> ()

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <cstring>
#include <vector>

#include "float_mode.h"
#include "isa.h"
#include "locks.h"
#include "observe.h"
#include "state_arguments.h"

namespace torchprobe::cpu {
namespace {

using torch::stable::Tensor;

double* address(const Tensor& state) { return static_cast<double*>(const_cast<void*>(state.const_data_ptr())); }

Tensor observe_read(std::vector<Tensor> states) {
  check_states(states);
  const int64_t slots = states[0].numel();
  Tensor result = torch::stable::new_empty(states[0], std::vector<int64_t>{int64_t(states.size()), slots});
  double* to = static_cast<double*>(result.mutable_data_ptr());
  for (const Tensor& state : states) {
    const double* from = address(state);
    const std::lock_guard<std::mutex> hold(lock_of(from));
    std::memcpy(to, from, size_t(slots) * sizeof(double));
    to += slots;
  }
  return result;
}

void observe_take_(std::vector<Tensor> states, Tensor out, bool calls) {
  check_taken(states, out);
  const int64_t slots = states[0].numel(), first = calls ? 0 : layout::CALLS + 1;
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (const Tensor& state : states) {
    double* from = address(state);
    const std::lock_guard<std::mutex> hold(lock_of(from));
    std::memcpy(to, from, size_t(slots) * sizeof(double));
    std::memset(from + first, 0, size_t(slots - first) * sizeof(double));
    to += slots;
  }
}

void observe_merge_(Tensor state, Tensor other) {
  check_pair(state, other, "other", 2);
  const EveryNumber exact;
  double* to = static_cast<double*>(state.mutable_data_ptr());
  const double* from = static_cast<const double*>(other.const_data_ptr());
  const int64_t all = state.numel(), slots = state.size(state.dim() - 1), features = (slots - layout::HEADER) / layout::ROWS;
  const ObserveKernels& kernels = choose<ObserveKernels>();
  for (int64_t first = 0; first < all; first += slots) {
    const std::lock_guard<std::mutex> hold(lock_of(to + first));
    to[first + layout::CALLS] += from[first + layout::CALLS];
    kernels.merge(to + first, from + first, features, 0, features, true);
  }
}

void observe_write_(Tensor state, Tensor other) {
  check_pair(state, other, "new");
  double* to = static_cast<double*>(state.mutable_data_ptr());
  const std::lock_guard<std::mutex> hold(lock_of(to));
  std::memcpy(to, other.const_data_ptr(), size_t(state.numel()) * sizeof(double));
}

// A process that forks waits until no thread is inside: the states are whole in the child, and no lock stays closed there.
#if defined(__unix__) || defined(__APPLE__)
void close_all() {
  for (int i = 0; i < LOCKS; ++i) lock_number(uintptr_t(i)).lock();
}
void open_all() {
  for (int i = 0; i < LOCKS; ++i) lock_number(uintptr_t(i)).unlock();
}
[[maybe_unused]] const int registered = pthread_atfork(close_all, open_all, open_all);
#endif

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) {
  m.impl("observe_read", TORCH_BOX(&torchprobe::cpu::observe_read));
  m.impl("observe_take_", TORCH_BOX(&torchprobe::cpu::observe_take_));
  m.impl("observe_merge_", TORCH_BOX(&torchprobe::cpu::observe_merge_));
  m.impl("observe_write_", TORCH_BOX(&torchprobe::cpu::observe_write_));
}
