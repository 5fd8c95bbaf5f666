// What a warp needs to walk through its share of x: where it lies, a ring of steps on their way from memory, and samples to choose a unit by.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// A block has a tile of vectors and a slab of features; each of its warps has some vectors of the tile, and all features of the slab.
struct Share {
  const Plan& plan;
  const Call& call = plan.call;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x / plan.slabs, slab = blockIdx.x % plan.slabs;
  const int64_t first = tile * plan.tile_vectors + warp * plan.warp_vectors, first_feature = slab * plan.slab_features;
  const int vectors = int(larger(int64_t(0), smaller(int64_t(plan.warp_vectors), call.vectors - first)));  // of the warp
  const int features = int(smaller(plan.slab_features, call.features - first_feature));                    // of the slab

  __device__ explicit Share(const Plan& plan) : plan(plan) {}

  // In shared memory: the rings of all warps, their partial sums, and what the block has in common, which begins with the vectors of each
  // warp that count.
  __device__ unsigned char* ring_of(int warp) const { return shared_memory + warp * plan.ring_bytes; }
  template <class T>
  __device__ Powers<T>* partial_sums() const {
    return reinterpret_cast<Powers<T>*>(ring_of(plan.warps) + warp * plan.part_bytes);
  }
  __device__ int* counts() const { return reinterpret_cast<int*>(ring_of(plan.warps) + plan.warps * plan.part_bytes); }
};

// A lane copies what it will read itself, so a warp waits for nobody. A step is COLUMNS elements of each lane, in packs of N. A turn is
// FLUSH / BATCH = 2 batches; the ring holds one or two turns.
template <class S, int N>
struct Ring {
  static constexpr int C = columns_of(sizeof(S)), PACKS = C / N, STAGES = stages_of(sizeof(S)), TURN = FLUSH * PACKS * 32;
  static_assert(FLUSH == 2 * BATCH && (STAGES == 2 || STAGES == 4));
  Pack<S, N>*here, *other;  // this turn's part of the ring, and the next one's

  __device__ explicit Ring(const Share& of)
      : here(reinterpret_cast<Pack<S, N>*>(of.ring_of(of.warp)) + of.lane), other(STAGES == 4 ? here + TURN : here) {}
  __device__ void next_turn() {
    Pack<S, N>* const before = here;
    here = other, other = before;
  }
  // Where the batch goes that is sent for before batch u of a turn, and where the first ones go before all turns.
  __device__ Pack<S, N>* sent(int u) const { return STAGES == 4 ? (u ? here : other + TURN / 2) : here + (u ? 0 : TURN / 2); }
  __device__ Pack<S, N>* sent_before(int stage) const { return (stage < 2 ? here : other) + stage % 2 * (TURN / 2); }
  // Zeros, for good, where a lane has nothing to send for.
  __device__ void clear() const {
    for (int k = 0; k < STAGES * BATCH * PACKS; ++k) here[k * 32] = Pack<S, N>{};
  }
  static __device__ Pack<S, N>* at(Pack<S, N>* batch, int step, int k) { return batch + (step * PACKS + k) * 32; }

  // A step of this turn, packed and as numbers.
  __device__ void take(int step, Pair<S> (&pairs)[C / 2], Compute<S> (&values)[C]) const {
    Pack<S, N> packs[PACKS];
    each<PACKS>([&](int k) { packs[k] = *at(here, step, k); });
    each<C / 2>([&](int i) {
      if constexpr (N == 1) pairs[i] = Pair<S>::of(packs[2 * i].value[0], packs[2 * i + 1].value[0]);
      else pairs[i] = Pair<S>::at(packs[2 * i / N].value + 2 * i % N);
      widen(pairs[i], values[2 * i], values[2 * i + 1]);
    });
  }
  // All but the batches that were sent for last have arrived.
  __device__ static void wait() { __pipeline_wait_prior(STAGES - 1); }
};

// Offsets of 32 vectors all over a tile, a lane each; not masked out if one of those behind it is not.
__device__ inline int64_t sample_offset(const Share& share) {
  const Call& call = share.call;
  const int64_t first = share.tile * share.plan.tile_vectors, n = smaller(int64_t(share.plan.tile_vectors), call.vectors - first);
  const int64_t vector = first + n * share.lane / 32, last = smaller(vector + 32, first + n);
  int64_t kept = vector;
  if (call.mask)
    while (kept < last && !call.mask[kept]) ++kept;
  return offset_of(call, kept < last ? kept : vector);
}

// The unit for the vectors of a tile, from samples of 32 features: the same in every block that has the tile. Powers about 0 need no shift, and
// those of numbers of ordinary size no scale; both are left out where the middle of the samples lies near 0.
template <class S>
__device__ inline Unit<Compute<S>> unit_of(const Share& share, int64_t offset) {
  using T = Compute<S>;
  constexpr int SAMPLES = 8;
  const S* const x = static_cast<const S*>(share.call.x) + share.lane * share.call.features / 32 * share.call.feature_stride;
  T values[SAMPLES], distances[SAMPLES], largest = 0;
  each<SAMPLES>([&](int s) { values[s] = widen(x[__shfl_sync(ALL_LANES, offset, s * 32 / SAMPLES)]); });
  auto middle = [](const T (&of)[SAMPLES]) {
    return middle_of_lanes(median(of[0], of[2], of[4], of[6]) / 2 + median(of[1], of[3], of[5], of[7]) / 2);
  };
  const T near = widen(narrow<S>(middle(values)));
  T shift = is_finite(near) ? near : T(0);
  each<SAMPLES>([&](int s) { distances[s] = fabs(values[s] - shift); });
  if (fabs(shift) <= T(1.4) * middle(distances)) shift = 0;
  each<SAMPLES>([&](int s) {
    if (is_finite(values[s] - shift)) largest = larger(largest, T(fabs(values[s] - shift)));
  });
  largest = warp_max(largest);
  const bool ordinary = largest == 0 || (largest >= T(0x1p-12) && largest <= T(0x1p12));
  const Unit<T> unit{ordinary ? T(1) : inverse_power(largest), shift};
  if (share.slab == 0 && threadIdx.x == 0) static_cast<Unit<T>*>(share.plan.units)[share.tile] = unit;
  return unit;
}

}  // namespace torchprobe::cuda
