// How a call is cut up: a function of the call and of the device's size. Shared by the host, which makes the plan, and the kernels, which get
// it as their only argument. And what launches them.
//
// The first launch reads x. A warp works on its own: each lane keeps `COLUMNS` sums in registers, side by side in memory, and walks down the
// steps of the other dimension. In rows the columns are features and the steps are vectors; in channel-major maps it is the other way round.
// A block is a tile of vectors × a slab of features. The second launch judges each vector by its sums, and merges everything into the state.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "call.h"
#include "layout.h"

namespace torchprobe::cuda {

enum class Layout { Rows, Channels };

// Types of 16 bits, as the kernels have them.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

constexpr int columns_of(size_t element) { return element == 8 ? 2 : 8; }
constexpr int stages_of(size_t element) { return element == 2 ? 4 : 2; }  // batches in the ring of a warp
constexpr int BATCH = 4;                                                   // steps that are fetched together
constexpr int FLUSH = 8;                                                   // steps whose partial sums are added up over the lanes together
constexpr int LONGEST = 512;                                               // steps that a lane sums up in T, at most
constexpr int MERGE_THREADS = 256;                                         // of a block of the second launch

// The most warps of a block, and the blocks that a multiprocessor has at a time: its registers and its shared memory allow no more.
constexpr int warps_of(Layout layout) { return layout == Layout::Rows ? 6 : 4; }
constexpr int blocks_of(Layout layout, int pack) { return (layout == Layout::Rows ? 2 : 3) - (pack == 1); }

// Room for the partial sums of a step in shared memory, in Powers: one or two for each lane. One more keeps lanes off each other's banks.
constexpr int pitch_of(Layout layout) { return layout == Layout::Rows ? 33 : 66; }

// From here on, T is the type of the computation: double for float64, float for all others.

// Sums of powers.
template <class T>
struct alignas(16) Powers {
  T s1, s2, s3, s4;
};

// The unit of the vectors of a tile: their sums are of the powers of (x − shift)·scale.
template <class T>
struct Unit {
  T scale, shift;
};

// What else a slab knows of a vector.
template <class T>
struct Note {
  T bound;         // what is not marked has at most this as its fourth power
  uint32_t marks;  // rows: lanes that may hold outliers
};

// What a tile found out about a feature: RECORD times `features` values, field by field. The sums are of the powers of (x − SHIFT)·SCALE and of
// |x|·SCALE.
enum Field { COUNT, NONFINITE, SHIFT, SCALE, S1, S2, S3, S4, LOW, HIGH, ABS_SUM, RECORD };

// What was found out about whole vectors.
struct Summary {
  double vectors, constant, invalid, mean, m2;
};

struct Plan {
  Call call;
  double* state;
  // workspace
  uint32_t* active;    // whether this call is read at all
  uint32_t* arrived;   // blocks of the second launch that have judged their vectors
  void* units;         // [tiles] Unit
  void* records;       // [tiles][RECORD][features] T
  void* sums;          // [slabs][vectors] Powers
  void* notes;         // [slabs][vectors] Note
  uint32_t* marks;     // channels: lanes that may hold outliers, [warps of all tiles][features]
  Summary* summaries;  // [judges]
  // the cut
  Layout layout;
  int pack;    // neighbors in memory that are copied at once
  int across;  // lanes side by side in a row; the others of the warp have rows of their own
  int warps, warp_vectors, tile_vectors, judges;
  int64_t tiles, slabs, slab_features;
  bool outliers_possible;
  double reach_squared;  // variances beyond which what is summed up of a vector is marked
  uint32_t ring_bytes, part_bytes, shared_bytes;  // of a warp; of a warp; of a block
};

struct Device {
  int index, multiprocessors;
  int shared_bytes;  // that one block may ask for
};

// Makes the plan, without its pointers.
Plan make_plan(const Call& call, const Device& device);

// Points the plan at a workspace; with null, only says how many bytes it takes.
size_t place(Plan& plan, void* workspace);

// The two launches of a call. Those of one type are compiled in observe_<type>.cu.
using Kernel = void (*)(const Plan);
struct Kernels {
  Kernel read, finish;
  size_t finish_shared;  // bytes of shared memory
};
template <class S>
Kernels kernels_of(const Plan& plan);

// Adds a call to plan.state, slot CALLS included: at most two launches on `stream`, none of which waits for anything. The plan points at its
// workspace. One host thread at a time.
cudaError_t observe(const Plan& plan, const Device& device, cudaStream_t stream);

// Whether the current device and its driver can run this build.
cudaError_t probe();

}  // namespace torchprobe::cuda
