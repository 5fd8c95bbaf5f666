// A block's walk over the vectors of its tile.
#pragma once

#include "features.cuh"
#include "merge.cuh"
#include "steps.cuh"
#include "vectors.cuh"

namespace torchprobe::cuda {

constexpr int SAMPLES = 8;  // vectors of a tile that the shift and the scale are taken from

// Of a vector: it is masked out or otherwise dealt with, its sums are fine, or they are not to be trusted.
enum Verdict : uint32_t { LEFT_OUT, REGULAR, IRREGULAR };

template <class S, Access A, bool Wide>
struct Tile : Steps<S, A, Wide> {
  using Base = Steps<S, A, Wide>;
  using Base::C, Base::R, Base::FULL;
  using typename Base::T;
  using Base::plan, Base::x, Base::first_vector, Base::vectors, Base::steps, Base::first_feature, Base::features, Base::thread;
  using Base::group, Base::place, Base::column, Base::there, Base::feature, Base::kept, Base::after, Base::offsets, Base::here;
  using Base::first_of, Base::look_up, Base::send_for, Base::first_round, Base::take, Base::widen_all, Base::element;

  // Where 16-bit elements of two features come in one register; to put them into one would cost as much as it saves.
  using Sums = Features<S, C, sizeof(S) == 2 && A == Access::Vector>;
  Sums sums;
  int taken = 0;  // vectors that went into the sums

  using Base::Base;

  // ---- the block as a whole --------------------------------------------------------------------------------------------------------------

  // The largest value of any thread.
  __device__ T block_max(T value) const {
    T* area = shared<T>(plan.part);
    value = warp_max(value);
    __syncthreads();
    if (thread % 32 == 0) area[thread / 32] = value;
    __syncthreads();
    for (int w = 0; w < int(blockDim.x) / 32; ++w) value = larger(value, area[w]);
    __syncthreads();
    return value;
  }

  // Adds up the sums of all groups; the first gets them.
  __device__ void fold_groups() {
    constexpr int K = Sums::NUMBERS;
    T* area = shared<T>(plan.part);
    int* counts = reinterpret_cast<int*>(area + (plan.groups + 1) / 2 * plan.across * C * K);
#pragma unroll 1
    for (int left = plan.groups; left > 1; left = (left + 1) / 2) {
      const int half = (left + 1) / 2, step = half * plan.across;
      __syncthreads();
      if (group >= half && group < left) {
#pragma unroll
        for (int i = 0; i < C; ++i) sums.hand_on(area + i * K * step + (group - half) * plan.across + place, step, i);
        if (place == 0) counts[group - half] = taken;
      }
      __syncthreads();
      if (group + half < left) {
#pragma unroll
        for (int i = 0; i < C; ++i) sums.take_in(area + i * K * step + group * plan.across + place, step, i);
        taken += counts[group];
      }
    }
    __syncthreads();
  }

  // ---- shift and scale -------------------------------------------------------------------------------------------------------------------

  // From a few vectors all over the tile: the shift and scale of each feature, and the scale for vectors. The features are shared out among all
  // threads of the block.
  __device__ T sample() {
    int64_t* const chosen = shared<int64_t>(plan.part);
    T *shifts = shared<T>(plan.part + SAMPLES * sizeof(int64_t)), *scales = shifts + plan.across * C, largest = 0;
    if (thread < SAMPLES) {
      // Positions side by side share what memory hands out at once, so they are sampled by fours.
      const int at = A == Access::Staged ? thread / 4 * (vectors / 2) + thread % 4 : vectors * thread / SAMPLES;
      chosen[thread] = offset_of(plan.call, first_vector + (at < vectors ? at : 0));
    }
    __syncthreads();
    for (int j = thread; j < features; j += blockDim.x) {
      T values[SAMPLES], spread = 0;
#pragma unroll
      for (int s = 0; s < SAMPLES; ++s) {
        values[s] = T(widen(*feature(chosen[s], j)));
        if constexpr (!Wide) {
          const T distance = T(fabs(values[s] - T(widen(*feature(chosen[s], 0)))));
          if (is_finite(distance)) largest = larger(largest, distance);
        }
      }
      T shift = median(values[0], values[2], values[4], values[6]) / 2 + median(values[1], values[3], values[5], values[7]) / 2;
      if (!is_finite(shift)) shift = 0;
#pragma unroll
      for (int s = 0; s < SAMPLES; ++s)
        if (is_finite(values[s])) spread = larger(spread, T(fabs(values[s] - shift)));
      shifts[j] = shift;
      scales[j] = spread > 0 && is_finite(spread) ? inverse_power(spread) : T(1);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < C; ++i) sums.set_shift(i, there(i) ? shifts[column(i)] : T(0), there(i) ? scales[column(i)] : T(1));
    if constexpr (Wide) {
      __syncthreads();
      return 1;
    }
    largest = block_max(largest);
    return largest > 0 ? inverse_power(largest) : T(1);
  }

  // ---- the walk --------------------------------------------------------------------------------------------------------------------------

  __device__ void walk(int64_t tile, int64_t slab) {
    Turn table{0, 0, 0}, ahead = table;
    for (int s = 0; s < plan.stages; ++s, table = after(table)) look_up(table);
    __syncthreads();
    for (int s = 0; s + 1 < plan.stages; ++s, ahead = after(ahead)) send_for(ahead);
    sums.clear();
    const T scale = sample();
    for (Turn now{0, 0, 0}; now.step < steps; now = after(now), ahead = after(ahead), table = after(table)) {
      if (A == Access::Staged) __syncthreads();  // nobody looks at the last step any more
      send_for(ahead);
      if (plan.stages == 1)
        __pipeline_wait_prior(0);
      else if (plan.stages == 2)
        __pipeline_wait_prior(1);
      else
        __pipeline_wait_prior(2);
      if (A == Access::Staged) __syncthreads();  // what others fetched
      observe_features(now);
      if constexpr (!Wide) {
        observe_vectors(now, table, scale);
      } else {
        __syncthreads();
        look_up(table);
        __syncthreads();
      }
    }
    finish_features(tile, slab);
  }

  // Every round of a step into the sums of its features; on the way the sum of each vector over the thread's features, for all to add up.
  __device__ void observe_features(Turn now) {
    if (group == plan.groups) return;
    T* part = shared<T>(plan.part) + first_of(0) * plan.pitch + place;
    const S* from = first_round(now);
    const unsigned* there_are = here(now) + group * plan.rounds;
#pragma unroll 1
    for (int round = 0; round < plan.rounds; ++round) {
      const unsigned bits = there_are[round];
      Pair<S> pairs[R][C / 2];
      T values[R][C];
      take(from, pairs);
      widen_all(pairs, values);
      if constexpr (!Wide) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          T sum = values[r][0];
#pragma unroll
          for (int i = 1; i < C; ++i) sum += values[r][i];
          *part = sum;
          part += plan.pitch;
        }
      }
      if (bits == FULL) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int i = 0; i < C; ++i) sums.add(i, values[r][i]);
          if constexpr (Sums::PACKED)
#pragma unroll
            for (int i = 0; i < C; i += 2) sums.extremes.add(i, pairs[r][i / 2]);
          else
#pragma unroll
            for (int i = 0; i < C; ++i) sums.extremes.lower(i, values[r][i]), sums.extremes.raise(i, values[r][i]);
        }
      } else {
#pragma unroll 1
        for (unsigned rest = bits; rest; rest &= rest - 1)
#pragma unroll
          for (int i = 0; i < C; ++i) add_one(i, there(i) ? element(now, first_of(round) + __ffs(rest) - 1, i) : T(0));
      }
      taken += __popc(bits);
    }
  }

  __device__ void add_one(int i, T x) {
    sums.add(i, x);
    sums.extremes.lower(i, x), sums.extremes.raise(i, x);
  }

  // ---- whole vectors ---------------------------------------------------------------------------------------------------------------------

  // Adds up what the threads have written of each vector: handle(vector, its sum as U, that of the second numbers, the largest of those) is
  // called by one thread each.
  template <class U, bool Two, class Handle>
  __device__ void over_features(Handle handle) const {
    const int lanes = plan.lanes, lane = thread & (lanes - 1), shift = __ffs(lanes) - 1, total = plan.step_vectors << shift;
    const int second = plan.step_vectors * plan.pitch, across = plan.across;
    const bool neighbours = across >= NEIGHBOURS;
    auto share = [&](int all) { return (all - lane + lanes - 1) >> shift; };  // of a lane
    const int fours = neighbours ? share(across / 4) : share(across) / 4, ones = neighbours ? share(across % 4) : share(across) % 4;
#pragma unroll 1
    for (int begin = 0; begin < total; begin += blockDim.x) {
      const int v = (begin + thread) >> shift;
      const bool mine = v < plan.step_vectors;
      U a = 0, b = 0;
      T largest = 0;
      auto add = [&](U x, U y, T most) { a += x, b += y, largest = larger(largest, most); };
      // By fours, as conversions to double are slow.
      auto add_four = [&](Pack<T, 4> x, Pack<T, 4> y) {
        const T *p = x.value, *q = y.value;
        add(U((p[0] + p[1]) + (p[2] + p[3])), U((q[0] + q[1]) + (q[2] + q[3])), larger(larger(q[0], q[1]), larger(q[2], q[3])));
      };
      if (mine) {
        const T *const begin_of = shared<T>(plan.part) + v * plan.pitch, *from = begin_of + lane;
        if (neighbours) {
          auto four = [](const T* at) { return *reinterpret_cast<const Pack<T, 4>*>(at); };
          from += 3 * lane;
#pragma unroll 1
          for (int rest = fours; rest > 0; --rest, from += 4 * lanes) add_four(four(from), Two ? four(from + second) : Pack<T, 4>{});
          from = begin_of + across / 4 * 4 + lane;
        } else {
          auto four = [&](const T* at) { return Pack<T, 4>{{at[0], at[lanes], at[2 * lanes], at[3 * lanes]}}; };
#pragma unroll 1
          for (int rest = fours; rest > 0; --rest, from += 4 * lanes) add_four(four(from), Two ? four(from + second) : Pack<T, 4>{});
        }
#pragma unroll 1
        for (int rest = ones; rest > 0; --rest, from += lanes) add(U(from[0]), Two ? U(from[second]) : U(0), Two ? from[second] : T(0));
      }
#pragma unroll 1
      for (int m = lanes / 2; m; m /= 2) {
        a += __shfl_xor_sync(ALL_LANES, a, m);
        if constexpr (Two) {
          b += __shfl_xor_sync(ALL_LANES, b, m);
          largest = larger(largest, __shfl_xor_sync(ALL_LANES, largest, m));
        }
      }
      if (mine && lane == 0) handle(v, a, b, largest);
    }
  }

  // One number of each vector of a round.
  __device__ Pack<T, R> pack_of(const T* numbers, int round) const { return *reinterpret_cast<const Pack<T, R>*>(numbers + first_of(round)); }

  // The vectors of a step: their sums are there. `table` is the step whose table is to be filled in meanwhile.
  __device__ void observe_vectors(Turn now, Turn table, T scale) {
    constexpr bool precise = sizeof(S) >= 4;
    const Call& call = plan.call;
    double* const mean = shared<double>(plan.mean);
    T *const high = shared<T>(plan.high), *const low = shared<T>(plan.low), *const threshold = shared<T>(plan.threshold);
    T* const part = shared<T>(plan.part);
    const int second = plan.step_vectors * plan.pitch;

    __syncthreads();
    over_features<double, false>([&](int v, double sum, double, T) {
      mean[v] = sum * plan.inverse_features;
      const T near = T(mean[v]);
      high[v] = near * scale;
      low[v] = precise ? T((mean[v] - double(near)) * double(scale)) : T(0);
    });
    look_up(table);
    __syncthreads();

    if (group < plan.groups) {
      const S* from = first_round(now);
      T* to = part + first_of(0) * plan.pitch + place;
#pragma unroll 1
      for (int round = 0; round < plan.rounds; ++round) {
        Pair<S> pairs[R][C / 2];
        T values[R][C];
        take(from, pairs);
        widen_all(pairs, values);
        const Pack<T, R> highs = pack_of(high, round), lows = pack_of(low, round);
#pragma unroll
        for (int r = 0; r < R; ++r, to += plan.pitch) {
          T s2 = 0, s4 = 0;
#pragma unroll
          for (int i = 0; i < C; ++i) {
            T d = fma(values[r][i], scale, -highs.value[r]);
            if (precise) d -= lows.value[r];
            if (A != Access::Vector && !there(i)) d = 0;
            const T q = d * d;
            s2 = i ? s2 + q : q;
            s4 = i ? fma(q, q, s4) : q * q;
          }
          to[0] = s2;
          to[second] = s4;
        }
      }
    }
    __syncthreads();

    // From here on, high and low hold the sums of the second and fourth powers.
    bool special = false;
    over_features<T, true>([&](int v, T s2, T s4, T largest) {
      high[v] = s2, low[v] = s4;
      special |= judge(now, v, s2, s4, largest, scale);
    });
    special = __syncthreads_or(special);
    const Verdict* verdict = shared<Verdict>(plan.verdict);
    for (int v = thread; v < plan.step_vectors; v += blockDim.x)
      if (verdict[v] == REGULAR)
        add_vector(shared<Tally>(plan.found)[v], double(low[v] / high[v] * (T(call.features) / high[v])), shared<uint32_t>(plan.histogram));
    if (!special) return;

    // Only a vector whose fourth powers are large enough can have outliers; and only the thread whose share of them is has one.
    if (group < plan.groups) {
      const T* fourth = part + second + first_of(0) * plan.pitch + place;
#pragma unroll 1
      for (int round = 0; round < plan.rounds; ++round) {
        const Pack<T, R> thresholds = pack_of(threshold, round);
        unsigned beyond = 0;
#pragma unroll
        for (int r = 0; r < R; ++r, fourth += plan.pitch)
          if (*fourth > thresholds.value[r]) beyond |= 1u << r;
#pragma unroll 1
        for (; beyond; beyond &= beyond - 1) count_outliers(now, first_of(round) + __ffs(beyond) - 1, scale);
      }
    }
    for (int v = thread / 32; v < plan.step_vectors; v += blockDim.x / 32)
      if (verdict[v] == IRREGULAR)
        exact_vector(call, x + offsets(now)[v], shared<uint32_t>(plan.outlier_counts), shared<uint32_t>(plan.histogram),
                     shared<Tally>(plan.found)[v]);
  }

  // What is to be done with a vector, now that its sums are there; `largest` is the largest share of the fourth powers. Says whether anything
  // but adding up the sums is: outliers must be looked for, or all be computed again.
  __device__ bool judge(Turn now, int v, T s2, T s4, T largest, T scale) const {
    constexpr T smallest = Limits<T>::low * Limits<T>::low, greatest = Limits<T>::high * Limits<T>::high, far = T(farthest_mean<S>);
    const double mean = shared<double>(plan.mean)[v];
    const T variance = s2 * T(plan.inverse_features), distance = T(mean) * scale;
    Verdict verdict = REGULAR;
    if (!(here(now)[v / R] >> v % R & 1)) {
      verdict = LEFT_OUT;
    } else if (plan.call.features == 1) {
      Tally& found = shared<Tally>(plan.found)[v];
      (is_finite(mean) ? found.constant : found.invalid) += 1;
      verdict = LEFT_OUT;
    } else if (!(variance >= smallest && variance <= greatest && is_finite(s4) && distance * distance <= far * far * variance)) {
      verdict = IRREGULAR;
    }
    const T threshold = verdict == REGULAR ? T(plan.outlier_threshold) * variance * variance : T(INFINITY);
    shared<Verdict>(plan.verdict)[v] = verdict;
    shared<T>(plan.threshold)[v] = threshold;
    return verdict == IRREGULAR || largest > threshold;
  }

  __device__ void count_outliers(Turn now, int v, T scale) const {
    const double mean = shared<double>(plan.mean)[v], sigma = plan.call.outlier_sigma;
    const double limit = sigma * fabs(sigma) * (double(shared<T>(plan.high)[v]) * plan.inverse_features);
    unsigned beyond = 0;  // which of the thread's features, all at once: this is where data with outliers spend their time
#pragma unroll
    for (int i = 0; i < C; ++i) {
      const double d = (double(element(now, v, i)) - mean) * double(scale);
      if (d * d > limit && there(i)) beyond |= 1u << i;
    }
    for (; beyond; beyond &= beyond - 1) atomicAdd(shared<uint32_t>(plan.outlier_counts) + column(__ffs(beyond) - 1), 1u);
  }

  // ---- the end ---------------------------------------------------------------------------------------------------------------------------

  // The sums of all groups into the tile's record. What cannot be trusted is summed up again.
  __device__ void finish_features(int64_t tile, int64_t slab) {
    fold_groups();
    const T inverse = T(1) / T(taken > 0 ? taken : 1);
    bool again = false;
    if (group == 0)
#pragma unroll
      for (int i = 0; i < C; ++i) again |= there(i) && taken > 0 && sums.unsuited(i, inverse);
    if (__syncthreads_or(again)) {
      observe_again(plan, tile, slab, taken);
    } else if (group == 0) {
#pragma unroll
      for (int i = 0; i < C; ++i)
        if (there(i)) record(i, taken, 0, sums.shift(i), sums.scale[i]);
    }
  }

  __device__ void record(int i, int count, int nonfinite, T shift, T scale) const {
    const int64_t tile = first_vector / plan.tile_vectors, features = plan.call.features;
    T* to = static_cast<T*>(plan.records) + tile * RECORD * features + first_feature + column(i);
    const bool any = count > 0;
    const T all[RECORD] = {T(count),   T(nonfinite), shift,      scale,
                           sums.s1[i], sums.s2[i],   sums.s3[i], sums.s4[i],
                           any ? sums.extremes.low(i) : T(0), any ? sums.extremes.high(i) : T(0), sums.abs_sum[i]};
#pragma unroll
    for (int k = 0; k < RECORD; ++k) to[k * features] = all[k];
  }

  // The whole tile once more, for the features that need it and those beside them: the finite values alone, about their mean, with a scale that
  // suits. Three passes: extremes, mean, powers. `before` is the number of vectors. A walk of its own, so that the fast one stays in registers.
  static __device__ __noinline__ void observe_again(const Plan& plan, int64_t tile, int64_t slab, int before) {
    Tile(plan, tile, slab).again(before);
  }

  // Calls f(i, x) for the thread's finite elements of the whole tile, straight from memory.
  template <class F>
  __device__ void revisit(F f) const {
    if (group == plan.groups) return;
#pragma unroll 1
    for (int v = group; v < vectors; v += plan.groups) {
      if (!kept(first_vector + v)) continue;
      const int64_t offset = offset_of(plan.call, first_vector + v);
#pragma unroll
      for (int i = 0; i < C; ++i) {
        const T value = there(i) ? T(widen(*feature(offset, column(i)))) : T(NAN);
        if (is_finite(value)) f(i, value);
      }
    }
  }

  __device__ void again(int before) {
    // What every group must know of a feature: numbers that the first group leaves in shared memory.
    T* area = shared<T>(plan.part);
    auto tell = [&](const T* mine, T* all) {
      __syncthreads();
      if (group == 0)
#pragma unroll
        for (int i = 0; i < C; ++i) area[i * plan.across + place] = mine[i];
      __syncthreads();
      if (group < plan.groups)
#pragma unroll
        for (int i = 0; i < C; ++i) all[i] = area[i * plan.across + place];
    };
    // The count of finite values goes through s1, which is exact for so few.
    T finite[C], low[C], high[C], unit[C], mean[C];
    sums.clear();
    revisit([&](int i, T value) {
      sums.s1[i] += 1;
      sums.extremes.lower(i, value), sums.extremes.raise(i, value);
    });
    fold_groups();
#pragma unroll
    for (int i = 0; i < C; ++i) low[i] = sums.extremes.low(i), high[i] = sums.extremes.high(i);
    tell(sums.s1, finite), tell(low, low), tell(high, high);
#pragma unroll
    for (int i = 0; i < C; ++i) unit[i] = inverse_power(finite[i] > 0 ? larger(T(fabs(low[i])), T(fabs(high[i]))) : T(1));

    sums.clear();
    revisit([&](int i, T value) { sums.s1[i] += value * unit[i]; });
    fold_groups();
    tell(sums.s1, mean);
#pragma unroll
    for (int i = 0; i < C; ++i) {
      mean[i] = finite[i] > 0 ? mean[i] / finite[i] * inverse_power(unit[i]) : T(0);
      const T half = larger(high[i] / 2 - mean[i] / 2, mean[i] / 2 - low[i] / 2);  // no difference of halves overflows
      sums.set_shift(i, mean[i], half > 0 ? inverse_power(half) / 2 : unit[i]);
    }

    sums.clear();
    revisit([&](int i, T value) { add_one(i, value); });
    fold_groups();
    if (group == 0)
#pragma unroll
      for (int i = 0; i < C; ++i)
        if (there(i)) record(i, int(finite[i]), before - int(finite[i]), mean[i], sums.scale[i]);
  }
};

}  // namespace torchprobe::cuda
