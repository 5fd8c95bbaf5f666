// The arguments of the operators on whole states of observe_, checked; the same for every device. torchprobe/ops/states.py has the schemas.
#pragma once

#include <vector>

#include "arguments.h"

namespace torchprobe {

// One state, or with `most_dims` 2 also several of them as the rows of a matrix.
inline void check_state(const torch::stable::Tensor& state, const torch::stable::Tensor& like, const char* name, int64_t most_dims = 1) {
  const int64_t dims = state.dim(), rows = dims > 0 ? state.size(dims - 1) - layout::HEADER : 0;
  STD_TORCH_CHECK(dims <= most_dims && state.scalar_type() == torch::headeronly::ScalarType::Double && state.is_contiguous() && rows > 0 &&
                      rows % layout::ROWS == 0,
                  name, " is not a state of observe_");
  STD_TORCH_CHECK(dims == like.dim() && state.size(0) == like.size(0) && state.size(dims - 1) == like.size(dims - 1) &&
                      state.device() == like.device(),
                  name, ": one has another size or device than the first state");
}

inline void check_states(const std::vector<torch::stable::Tensor>& states) {
  STD_TORCH_CHECK(!states.empty(), "states is empty");
  for (const torch::stable::Tensor& state : states) {
    check_state(state, states[0], "states");
    Memory().reads(state, "states");
  }
}

// States that are emptied into the rows of `out`.
inline void check_taken(const std::vector<torch::stable::Tensor>& states, const torch::stable::Tensor& out) {
  check_states(states);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == int64_t(states.size()) && out.size(1) == states[0].numel() && out.is_contiguous() &&
                      out.scalar_type() == states[0].scalar_type() && out.device() == states[0].device(),
                  "out must have a row for each state");
  for (const torch::stable::Tensor& state : states) {
    Memory memory;
    memory.writes(state, "states");
    memory.writes(out, "out");
  }
}

// A state that is written to, and one that is read.
inline void check_pair(const torch::stable::Tensor& state, const torch::stable::Tensor& other, const char* name, int64_t most_dims = 1) {
  check_state(state, state, "state", most_dims);
  check_state(other, state, name, most_dims);
  Memory memory;
  memory.writes(state, "state");
  memory.reads(other, name);
}

}  // namespace torchprobe
