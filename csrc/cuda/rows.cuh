// Vectors that lie in memory as rows, or anywhere. A lane keeps the sums of COLUMNS features in registers and walks down the vectors of its
// warp; of each vector the sums of powers are added up over the lanes, FLUSH vectors at a time. What is rare is not inlined into the walk, which
// keeps its registers for sums.
#pragma once

#include "totals.cuh"

namespace torchprobe::cuda {

template <class S, int N>
struct Rows : Share {
  using T = Compute<S>;
  static constexpr int C = columns_of(sizeof(S)), PACKS = C / N, STAGES = stages_of(sizeof(S)), PITCH = pitch_of(Layout::Rows);

  const int across = plan.across, groups = 32 / across;    // lanes side by side in a row, rows side by side in a warp
  const int place = lane % across, group = lane / across;  // which of them this one is
  const int64_t pitch = call.dims ? groups * call.stride[call.dims - 1] : 0;  // from a lane's row to its next
  Ring<S, N> ring{*this};
  Powers<T>* const part = partial_sums<T>();
  Unit<T> unit;
  T scale[PACKS], base[PACKS];      // of the vectors, −shift·scale; 0 where a pack has no features
  T offset[C];                      // −shift·scale of the features
  Powers<T> sums[C] = {};
  T abs_sum[C] = {};
  Pair<S> lowest[C / 2], highest[C / 2];
  unsigned has = 0;         // which of the lane's packs have features
  int taken = 0;            // vectors in the sums
  int next = 0, left = 0;   // the row to be sent for next, and how many lie at the same distance from each other from there on
  const S* from = nullptr;  // the lane's first element of it
  // What a lane adds up in a flush is of eight lanes: one through their features, and through 32 times those of the slab.
  T inverse, inverse_slab = T(1) / T(32 * features);
  int64_t out;  // where the lane's vectors of a flush go, and how many there are
  int rest;

  __device__ explicit Rows(const Plan& p) : Share(p) {}

  __device__ int column(int place, int i) const { return (i / N * across + place) * N + i % N; }  // of the slab
  __device__ bool there(int place, int k) const { return column(place, k * N) < features; }
  __device__ int64_t to_pack(int k) const { return N > 1 ? k * across * N : k * across * call.feature_stride; }
  __device__ const S* element(int64_t offset) const {  // the lane's first one of the vector there
    return static_cast<const S*>(call.x) + offset + (first_feature + column(place, 0)) * call.feature_stride;
  }
  __device__ Totals<T>* totals(int warp) const { return reinterpret_cast<Totals<T>*>(ring_of(warp)); }  // when the ring is done with

  __device__ void start() {
    const int64_t offset_of_sample = sample_offset(*this);
    unit = unit_of<S>(*this, offset_of_sample);
    each<PACKS>([&](int k) {
      has |= unsigned(there(place, k)) << k;
      scale[k] = there(place, k) ? unit.scale : T(0), base[k] = -(unit.shift * scale[k]);
    });
    each<C / 2>([&](int k) { lowest[k] = twice<S>(INFINITY), highest[k] = twice<S>(-INFINITY); });
    choose_shifts(offset_of_sample);
    // Of eight lanes, or of several eights, the first writes the vectors of a flush.
    const int eight = lane / 8 * 8, own = lane % FLUSH * groups + eight / across;
    out = slab * call.vectors + first + own, rest = eight % across ? 0 : vectors - own;
    int of_eight = N * __popc(has);
    for (int m = 1; m < 8; m *= 2) of_eight += other_lane(of_eight, m);
    inverse = of_eight ? T(1) / T(of_eight) : T(0);
    ring.clear();
  }

  // The shift of a feature: the mean of middle values of the tile. Its scale is that of the vectors.
  __device__ void choose_shifts(int64_t offset_of_sample) {
    constexpr int FOURS = 4;
    const S* const mine = element(0);
    T shift[C] = {};
#pragma unroll sizeof(S) == 2 ? 2 : 1
    for (int f = 0; f < FOURS; ++f) {
      T values[4][C];
      each<4>([&](int s) {
        const S* const row = mine + __shfl_sync(ALL_LANES, offset_of_sample, 32 / FOURS * s + f * 2);
        each<PACKS>([&](int k) {
          const Pack<S, N> some = has >> k & 1 ? *reinterpret_cast<const Pack<S, N>*>(row + to_pack(k)) : Pack<S, N>{};
          each<N>([&](int i) { values[s][k * N + i] = widen(some.value[i]); });
        });
      });
      each<C>([&](int i) { shift[i] += median(values[0][i], values[1][i], values[2][i], values[3][i]) / FOURS; });
    }
    each<C>([&](int i) { offset[i] = is_finite(shift[i] * unit.scale) ? -(shift[i] * unit.scale) : T(0); });
  }

  // Where the lane's row lies that is to be sent for next, and how many from there on lie at one distance from each other.
  struct Run {
    const S* from;
    int left;
  };
  static __device__ __noinline__ Run find(const Plan& plan, int next) {
    const Rows view(plan);
    if (next >= view.vectors) return {nullptr, INT32_MAX};
    const int64_t vector = view.first + next, run = plan.call.dims ? plan.call.size[plan.call.dims - 1] : 1;
    return {view.element(offset_of(plan.call, vector + view.group)), int(smaller(int64_t(view.vectors - next), run - vector % run))};
  }
  static __device__ __noinline__ void send_each(const Plan& plan, int next, Pack<S, N>* batch) {
    const Rows view(plan);
    for (int r = 0; r < BATCH; ++r)
      if (const int row = next + r * view.groups + view.group; row < view.vectors) {
        const S* const from = view.element(offset_of(plan.call, view.first + row));
        for (int k = 0; k < PACKS; ++k)
          if (view.there(view.place, k)) fetch(Ring<S, N>::at(batch, r, k), reinterpret_cast<const Pack<S, N>*>(from + view.to_pack(k)));
      }
  }
  // Which of the lane's rows of a batch count; whether all rows of a turn do.
  static __device__ __noinline__ unsigned counted(const Plan& plan, int batch) {
    const Rows view(plan);
    unsigned bits = 0;
    for (int r = 0; r < BATCH; ++r)
      if (const int row = (batch * BATCH + r) * view.groups + view.group; row < view.vectors)
        bits |= unsigned(!plan.call.mask || plan.call.mask[view.first + row]) << r;
    return bits;
  }
  static __device__ __noinline__ bool all_counted(const Plan& plan, int batch) {
    const Rows view(plan);
    return __all_sync(ALL_LANES, view.lane >= FLUSH * view.groups || plan.call.mask[view.first + batch * BATCH * view.groups + view.lane]);
  }

  // Marks the lanes with larger parts than the limit, and returns the largest part of the others. Not inlined: most vectors have none.
  static __device__ __noinline__ Note<T> mark(const Powers<T>* parts, T limit, int across) {
    const int share = threadIdx.x % 32 / FLUSH;
    T bound = 0;
    unsigned found = 0;
    for (int k = 0; k < 8; ++k)
      if (parts[k].s4 > limit)
        found |= 1u << (share * 8 % across + k);
      else
        bound = larger(bound, parts[k].s4);
    for (int m = 8; m < across; m *= 2) found |= other_lane(found, m), bound = larger(bound, other_lane(bound, m));
    return {bound, found};
  }

  template <bool Fast>
  __device__ void send(Pack<S, N>* batch) {
    if constexpr (Fast) {
      each<PACKS>([&](int k) {
        if (has >> k & 1)
          each<BATCH>([&](int r) { fetch(ring.at(batch, r, k), reinterpret_cast<const Pack<S, N>*>(from + r * pitch + to_pack(k))); });
      });
      from += BATCH * pitch, next += BATCH * groups, left -= BATCH * groups;
    } else {
      if (next < vectors) send_each(plan, next, batch);
      next += BATCH * groups, look();
    }
    __pipeline_commit();
  }
  // Behind the last row, no pack has anything to send for.
  __device__ void look() {
    const auto run = find(plan, next);
    from = run.from, left = run.left;
    if (next >= vectors) has = 0;
  }

  // A vector: its powers as the lane's part of them, and into the sums of the features if it counts.
  template <bool Plain>
  __device__ void step(int at, bool counts) {
    Pair<S> pairs[C / 2];
    T values[C];
    ring.take(at, pairs, values);
    Powers<T> row;
    each<C>([&](int i) {
      const T u = Plain ? values[i] : fma(values[i], scale[i / N], base[i / N]);
      i ? add(row, u) : begin(row, u);
    });
    part[at * PITCH + lane] = row;
    if (!counts) return;
    each<C>([&](int i) {
      add(sums[i], Plain ? values[i] + offset[i] : fma(values[i], scale[i / N], offset[i]));
      abs_sum[i] = Plain ? abs_sum[i] + T(fabs(values[i])) : fma(T(fabs(values[i])), scale[i / N], abs_sum[i]);
    });
    each<C / 2>([&](int k) { lowest[k] = smaller(lowest[k], pairs[k]), highest[k] = larger(highest[k], pairs[k]); });
  }

  // FLUSH steps. Fast: all of them count, and what is sent for meanwhile lies at one distance.
  template <bool Plain, bool Fast>
  __device__ void turn(int batch) {
    each<2>([&](int u) {
      send<Fast>(ring.sent(u));
      ring.wait();
      const unsigned bits = Fast ? (1u << BATCH) - 1 : counted(plan, batch + u);
      each<BATCH>([&](int r) { step<Plain>(u * BATCH + r, Fast || bits >> r & 1); });
      taken += __popc(bits);
    });
    ring.next_turn();
    flush(batch * BATCH);
  }
  template <bool Plain>
  __device__ void walk() {
    look();
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) send<false>(ring.sent_before(s));
#pragma unroll 1
    for (int batch = 0; batch * BATCH * groups < vectors;) {
      if (next >= vectors) look();
      int fast = smaller(vectors - batch * BATCH * groups, left) / (FLUSH * groups);  // turns from here on; with a mask, at most one
      if (call.mask) fast = fast && all_counted(plan, batch);
#pragma unroll 1
      for (; fast > 0; --fast, batch += 2) turn<Plain, true>(batch);
      if (batch * BATCH * groups < vectors) turn<Plain, false>(batch), batch += 2;
    }
  }

  // Adds up FLUSH steps: a lane has the parts of eight lanes of one step. A part that is large enough marks its lane: it may hold an outlier.
  __device__ void flush(int step) {
    __syncwarp();
    const Powers<T>* const parts = part + lane % FLUSH * PITCH + lane / FLUSH * 8;
    Powers<T> all = parts[0];
    T most = all.s4;
    for (int k = 1; k < 8; ++k) add(all, parts[k]), most = larger(most, parts[k].s4);
    // The variance in the quietest part of the vector: the others may have outliers. But no part is too quiet to be compared with.
    T quiet = inverse > 0 ? (all.s2 - all.s1 * all.s1 * inverse) * inverse : T(INFINITY), bound = most;
    for (int m = 8; m < 32; m *= 2)
      if (m < across) add_lane(all, m), quiet = smaller(quiet, other_lane(quiet, m)), bound = larger(bound, other_lane(bound, m));
    quiet = T(plan.reach_squared) * larger(quiet, all.s2 * inverse_slab);
    Note<T> note{bound, 0};
    if (__any_sync(ALL_LANES, most > quiet * quiet)) note = mark(parts, quiet * quiet, across);
    if (step * groups < rest) {
      static_cast<Powers<T>*>(plan.sums)[out + step * groups] = all;
      static_cast<Note<T>*>(plan.notes)[out + step * groups] = note;
    }
    __syncwarp();
  }

  // The totals of the warp, and those of all warps into the record of the tile.
  __device__ void finish() {
    Totals<T> all[C];
    each<C / 2>([&](int k) {
      widen(lowest[k], all[2 * k].low, all[2 * k + 1].low), widen(highest[k], all[2 * k].high, all[2 * k + 1].high);
    });
    each<C>([&](int i) { all[i].sums = sums[i], all[i].abs_sum = abs_sum[i], all[i].shift = -offset[i] * inverse_power(unit.scale); });
#pragma unroll 1
    for (int m = across; m < 32; m *= 2) {
      taken += other_lane(taken, m);
      each<C>([&](int i) { all[i].add_lane(m); });
    }
    if (group == 0) each<C>([&](int i) { totals(warp)[column(place, i)] = all[i]; });
    if (lane == 0) counts()[warp] = taken;
    __syncthreads();
    const Share share(plan);
    for (int j = warp * 32; j < features; j += 32 * plan.warps)
      record_features<S>(share, first_feature + j, features - j, totals(0) + j, int(plan.ring_bytes / sizeof(Totals<T>)), unit.scale);
  }
  __device__ void run() {
    start();
    unit.scale == 1 && unit.shift == 0 ? walk<true>() : walk<false>();
    __pipeline_wait_prior(0);
    __syncwarp();
    finish();
  }
};

}  // namespace torchprobe::cuda
