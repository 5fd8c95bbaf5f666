// The vectors of a tile, step by step: where they lie, and how they come from memory to the threads that work on them.
#pragma once

#include "values.cuh"

namespace torchprobe::cuda {

// A step, and where in their rings its elements and its table lie.
struct Turn {
  int step, data, table;
};

// A thread's view of them.
template <class S, Access A, bool Wide>
struct Steps {
  static constexpr int C = SHAPE<S>.columns, R = SHAPE<S>.rows;
  static constexpr int N = A == Access::Vector ? 16 / sizeof(S) : 1;  // neighbours in memory
  static constexpr unsigned FULL = (1u << R) - 1;
  using T = Compute<S>;

  const Plan& plan;
  const S* const x;
  const int64_t first_vector;  // of the tile
  const int vectors, steps;
  const int64_t first_feature;  // of the slab
  const int features;
  const int thread, group, place;  // which of the groups; which of those across. group == plan.groups: a thread that only helps out

  __device__ Steps(const Plan& plan, int64_t tile, int64_t slab)
      : plan(plan),
        x(static_cast<const S*>(plan.call.x)),
        first_vector(tile * plan.tile_vectors),
        vectors(int(plan.call.vectors - first_vector < plan.tile_vectors ? plan.call.vectors - first_vector : plan.tile_vectors)),
        steps((vectors + plan.step_vectors - 1) / plan.step_vectors),
        first_feature(slab * plan.slab_features),
        features(int(plan.call.features - first_feature < plan.slab_features ? plan.call.features - first_feature : plan.slab_features)),
        thread(int(threadIdx.x)),
        group(int(threadIdx.x) / plan.across < plan.groups ? int(threadIdx.x) / plan.across : plan.groups),
        place(int(threadIdx.x) % plan.across) {}

  // ---- where things lie ------------------------------------------------------------------------------------------------------------------

  // The thread's i-th feature within the slab, and whether there is one. Threads side by side have packs of features side by side.
  static constexpr bool ALL_THERE = A == Access::Vector && !Wide;
  __device__ int column(int i) const { return (i / N * plan.across + place) * N + i % N; }
  __device__ bool there(int i) const { return group < plan.groups && (ALL_THERE || column(i) < features); }
  __device__ const S* feature(int64_t offset, int column) const { return x + offset + (first_feature + column) * plan.call.feature_stride; }
  __device__ bool kept(int64_t vector) const { return !plan.call.mask || plan.call.mask[vector]; }

  __device__ Turn after(Turn t) const {
    return {t.step + 1, t.data + 1 == plan.stages ? 0 : t.data + 1, t.table == plan.stages ? 0 : t.table + 1};
  }
  // Offsets of the vectors of a step, and R bits for each round of each group: which of its vectors are there.
  __device__ int64_t* offsets(Turn t) const { return shared<int64_t>(plan.offsets) + t.table * plan.step_vectors; }
  __device__ unsigned* here(Turn t) const { return shared<unsigned>(plan.here) + t.table * plan.groups * plan.rounds; }
  __device__ S* data(Turn t) const {
    return shared<S>(plan.data) + t.data * (A == Access::Staged ? int(plan.slab_features) * plan.staged_pitch : plan.step_vectors * plan.across * C);
  }
  // The thread's first element of a vector, and how far from it its i-th lies.
  __device__ S* row_of(Turn t, int vector) const { return data(t) + vector * plan.across * C + column(0); }
  __device__ int next(int i) const { return i / N * plan.across * N + i % N; }
  // The first vector of a round, within the step.
  __device__ int first_of(int round) const { return (group * plan.rounds + round) * R; }

  // Fills in offsets and here of a step. The caller puts a barrier between this and their use.
  __device__ void look_up(Turn t) const {
    if (t.step >= steps) return;
    const int first = t.step * plan.step_vectors;
    for (int v = thread; v < plan.step_vectors; v += blockDim.x) offsets(t)[v] = first + v < vectors ? offset_of(plan.call, first_vector + first + v) : 0;
    for (int k = thread; k < plan.groups * plan.rounds; k += blockDim.x) {
      unsigned bits = 0;
      for (int r = 0; r < R; ++r) {
        const int at = first + k * R + r;
        if (at < vectors && kept(first_vector + at)) bits |= 1u << r;
      }
      here(t)[k] = bits;
    }
  }

  // ---- from memory -----------------------------------------------------------------------------------------------------------------------

  // Sends for the elements of a step.
  __device__ void send_for(Turn t) const {
    if (t.step < steps) {
      if constexpr (A == Access::Staged)
        send_for_positions(t);
      else if (group < plan.groups)
        send_for_rows(t);
    }
    __pipeline_commit();
  }

  // What each thread fetches is what it will use itself; a few vectors too many at the end, whose offsets are 0.
  __device__ void send_for_rows(Turn t) const {
    constexpr int M = A == Access::Vector ? R : 1;  // vectors at a time
    const int64_t *offset = offsets(t) + first_of(0), stride = A == Access::Vector ? 1 : plan.call.feature_stride;
    S* to = row_of(t, first_of(0));
    const S* const from = x + (first_feature + column(0)) * stride;
    const int rest = vectors - t.step * plan.step_vectors - first_of(0), rows = smaller(plan.rounds * R, rest);
#pragma unroll 4 / M
    for (int v = 0; v < rows; v += M) {
      const S* row[M];  // all before the first copy: the compiler moves nothing across one
#pragma unroll
      for (int r = 0; r < M; ++r) row[r] = from + offset[v + r];
#pragma unroll
      for (int r = 0; r < M; ++r, to += plan.across * C)
#pragma unroll
        for (int i = 0; i < C; i += N)
          if (ALL_THERE || there(i))
            fetch(reinterpret_cast<Pack<S, N>*>(to + next(i)), reinterpret_cast<const Pack<S, N>*>(row[r] + next(i) * stride));
    }
  }

  // Neighbouring threads fetch neighbouring positions of one feature, four at a time where memory allows.
  __device__ void send_for_positions(Turn t) const {
    constexpr int M = 4;
    const int64_t* offset = offsets(t);
    const int packs = plan.step_vectors / M, rest = vectors - t.step * plan.step_vectors;
    S* const to = data(t);
    for (int at = thread; at < packs * features; at += blockDim.x) {
      const int v = at % packs * M, j = at / packs;
      if (v >= rest) continue;
      const S* from = feature(offset[v], j);
      S* place = to + j * plan.staged_pitch + v;
      const bool together = v + M <= rest && offset[v + M - 1] == offset[v] + M - 1 && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<S, M>) == 0;
      if (together && sizeof(Pack<S, M>) <= 16)
        fetch(reinterpret_cast<Pack<S, M>*>(place), reinterpret_cast<const Pack<S, M>*>(from));
      else
        for (int i = 0; i < M && v + i < rest; ++i) fetch(place + i, feature(offset[v + i], j));
    }
  }

  // Where the thread's elements of a step begin, and those of the next round, which have arrived. 0 where there is no such feature; anything
  // where there is no such vector. A pack is all there or not at all.
  __device__ const S* first_round(Turn t) const { return A == Access::Staged ? data(t) + first_of(0) : row_of(t, first_of(0)); }
  __device__ void take(const S*& from, Pair<S> (&to)[R][C / 2]) const {
    if constexpr (A == Access::Staged) {
#pragma unroll
      for (int i = 0; i < C; i += 2) {
        const Pack<S, R> a = *reinterpret_cast<const Pack<S, R>*>(from + (there(i) ? column(i) : 0) * plan.staged_pitch);
        const Pack<S, R> b = *reinterpret_cast<const Pack<S, R>*>(from + (there(i + 1) ? column(i + 1) : 0) * plan.staged_pitch);
#pragma unroll
        for (int r = 0; r < R; ++r) to[r][i / 2] = Pair<S>::of(there(i) ? a.value[r] : S{}, there(i + 1) ? b.value[r] : S{});
      }
      from += R;
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r, from += plan.across * C)
#pragma unroll
        for (int i = 0; i < C; i += N < 2 ? 2 : N)
          if constexpr (N >= 2) {
            const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from + next(i));
#pragma unroll
            for (int k = 0; k < N; k += 2) to[r][(i + k) / 2] = ALL_THERE || there(i) ? Pair<S>::at(pack.value + k) : Pair<S>{};
          } else {
            to[r][i / 2] = Pair<S>::of(there(i) ? from[next(i)] : S{}, there(i + 1) ? from[next(i + 1)] : S{});
          }
    }
  }
  __device__ static void widen_all(const Pair<S> (&from)[R][C / 2], T (&to)[R][C]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int i = 0; i < C; i += 2) widen(from[r][i / 2], to[r][i], to[r][i + 1]);
  }
  // One of them.
  __device__ T element(Turn t, int vector, int i) const {
    return widen(data(t)[A == Access::Staged ? column(i) * plan.staged_pitch + vector : vector * plan.across * C + column(i)]);
  }
};

}  // namespace torchprobe::cuda
