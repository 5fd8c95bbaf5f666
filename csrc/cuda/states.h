// Whole states on CUDA: read, taken, merged and replaced between the launches of two calls. torchprobe/ops/states.py explains the operators.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <mutex>
#include <vector>

namespace torchprobe::cuda {

// Held while launches that belong together are made. A call decides with its first launch whether it counts, and notes it with its second;
// what is done to a whole state takes several operations. Threads that share a state must not come in between.
std::mutex& turn();

// Calls an operator; the stack has its arguments, and then its result.
template <size_t N>
void call(const char* name, const char* overload, std::array<StableIValue, N>& stack) {
  STD_TORCH_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, "torchprobe: ", name,
                  " failed; what stopped it is printed above");
}

torch::stable::Tensor observe_read(std::vector<torch::stable::Tensor> states);
void observe_take_(std::vector<torch::stable::Tensor> states, torch::stable::Tensor out, bool calls);
void observe_merge_(torch::stable::Tensor state, torch::stable::Tensor other);
void observe_write_(torch::stable::Tensor state, torch::stable::Tensor other);

}  // namespace torchprobe::cuda
