// How a call is cut up: a function of the call and of the device's size. Shared by the host, which makes the plan, and the kernels, which get
// it as their only argument.
//
// The vectors of a call are cut into tiles, one block of threads each. In a block, `across` threads lie side by side, each with `columns`
// features of its own; `groups` of them stand behind each other, each with vectors of its own: `rows` at a time, `rounds` times in a step. A step
// is what a block works on between its barriers; the steps to come are on their way from memory meanwhile.
//
// When the features are too many for one block (`wide`), they are cut into slabs and the vectors are left to blocks of their own: the
// activation is then read twice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "call.h"
#include "layout.h"

namespace torchprobe::cuda {

// Where the features of a thread lie, and how they come.
enum class Access {
  Vector,  // neighbours in memory: 16 bytes at a time
  Scalar,  // one by one, whatever the strides
  Staged,  // neighbouring vectors are contiguous, as in (N, C, H, W): positions at a time, turned round in shared memory
};

// The shape of a thread's share, and the most threads of a block that the registers then allow.
struct Shape {
  int columns, rows, threads;
};
template <class S>
constexpr Shape SHAPE = sizeof(S) == 8 ? Shape{2, 4, 384} : Shape{8, 4, 384};

// What a block found out about whole vectors.
struct Summary {
  double vectors, constant, invalid, mean, m2;
};

// The same while it is being counted: sums of the kurtosis minus the first one.
struct Tally {
  double vectors, constant, invalid, pivot, sum, squares;
};

// What a tile found out about a feature, in the type T of the computation; RECORD times `features` values, field by field. The sums are of the
// powers of (x − SHIFT)·SCALE and of |x|·SCALE.
enum Field { COUNT, NONFINITE, SHIFT, SCALE, S1, S2, S3, S4, LOW, HIGH, ABS_SUM, RECORD };

constexpr int MAX_GROUPS = 32;
constexpr int MAX_STAGES = 3;
constexpr int MAX_ROUNDS = 8;
constexpr int MAX_STEP = 128;         // vectors of a step of several rounds
constexpr int TILE_ROWS = 512;        // that a thread sums up in one go, at most
constexpr int NEIGHBOURS = 32;        // so many partial sums of a vector are added up four neighbours at a time
constexpr int MERGE_PARTS = 16;       // threads that share the tiles of a feature when they are merged
constexpr int64_t HISTOGRAM_BLOCKS = (layout::BINS + 31) / 32;

struct Plan {
  Call call;
  double* state;
  // workspace
  uint32_t* active;      // whether this call is read at all
  void* records;         // [tiles][RECORD][features] of T
  uint32_t* outliers;    // [summaries][features]
  uint32_t* histograms;  // [summaries][BINS]
  Summary* summary;      // [summaries]
  // the cut
  Access access;
  bool wide;
  int across, groups, rounds, threads;
  int64_t tiles, slabs, slab_features, vector_blocks, summaries;
  int tile_vectors, step_vectors, stages;
  // what every vector needs
  double inverse_features;
  double outlier_threshold;  // times the squared variance: what the fourth powers of a vector with outliers sum up to at least
  // shared memory of a block, in bytes from its start
  int lanes, pitch, staged_pitch;  // threads that add up one vector; elements from one vector's partial sums to the next; likewise staged
  uint32_t offsets, here, mean, high, low, threshold, verdict, found, part, outlier_counts, histogram, data, shared_bytes;
};

// Makes the plan, without its pointers. `shared_limit` and `multiprocessors` are the device's.
Plan make_plan(const Call& call, int multiprocessors, int shared_limit);

// Points the plan at a workspace; with null, only says how many bytes it takes.
size_t place(Plan& plan, void* workspace);

}  // namespace torchprobe::cuda
