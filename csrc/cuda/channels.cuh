// Vectors that lie side by side, as in (N, C, H, W): rows with the roles swapped. A lane keeps the sums of COLUMNS vectors in registers and
// walks down the channels; of each channel the sums are added up over the warp, FLUSH channels at a time, and then over the block.
#pragma once

#include "totals.cuh"

namespace torchprobe::cuda {

template <class S, int N>
struct Channels : Share {
  using T = Compute<S>;
  static constexpr int C = columns_of(sizeof(S)), PACKS = C / N, STAGES = stages_of(sizeof(S));
  static constexpr int PITCH = pitch_of(Layout::Channels), SAMPLES = 16;
  // What a lane knows of a channel beside the powers.
  struct Rest {
    T abs_sum;
    Extremes<S> extremes;
    T unused;
  };

  T* const shifts = reinterpret_cast<T*>(counts() + 16);                       // of the channels of this flush and of the next
  Totals<T>* const folded = reinterpret_cast<Totals<T>*>(shifts + 2 * FLUSH);  // [2][warps][FLUSH]
  int64_t* const samples = reinterpret_cast<int64_t*>(folded + 2 * plan.warps * FLUSH);  // offsets of vectors all over the tile

  Ring<S, N> ring{*this};
  Powers<T>* const part = partial_sums<T>();
  Unit<T> unit;
  T base, limit, lowest_limit;  // −shift·scale; what a lane may have without being marked; the lowest of the eight lanes that a lane adds up
  unsigned kept = 0;      // which of the lane's vectors count
  bool whole;             // whether all vectors of the block do
  Powers<T> sums[C] = {};
  const S* from[PACKS];  // the next channel to be sent for
  int next = 0;
  // Of a turn: the shifts of its channels, where the lane's channel goes when it is added up, and where its marks go.
  const T* shift = shifts;
  Totals<T>* fold_to = folded + warp * FLUSH + lane % FLUSH;
  uint32_t* marks_to = plan.marks + (tile * plan.warps + warp) * call.features + first_feature + lane % FLUSH;
  int shift_step = FLUSH, fold_step = plan.warps * FLUSH, turns_left = warp;  // until the warp works for the block

  __device__ explicit Channels(const Plan& p) : Share(p) {}

  __device__ int vector(int i) const { return (i / N * 32 + lane) * N + i % N; }  // of the warp
  __device__ const S* channel(int64_t offset, int64_t c) const {
    return static_cast<const S*>(call.x) + offset + (first_feature + c) * call.feature_stride;
  }
  __device__ bool keeps(int i) const { return kept >> i & 1; }

  __device__ void start() {
    unit = unit_of<S>(*this, sample_offset(*this)), base = -(unit.shift * unit.scale);
    each<PACKS>([&](int k) { from[k] = channel(vector(k * N) < vectors ? offset_of(call, first + vector(k * N)) : 0, 0); });
    each<C>([&](int i) { kept |= unsigned(vector(i) < vectors && (!call.mask || call.mask[first + vector(i)])) << i; });
    choose_limit();
    const int count = warp_sum(__popc(kept));
    if (lane == 0) counts()[warp] = count;
    if (warp == 0) choose_samples(), sample_channels(0, unit.scale);
    whole = !__syncthreads_or(kept != (1u << C) - 1);
  }

  // What a lane's values may be before its vectors are looked at for outliers: the spread in the quietest of a few groups of channels.
  __device__ void choose_limit() {
    constexpr int GROUPS = 4, EACH = 2;
    T quiet = INFINITY, mean = 0;
    each<GROUPS>([&](int g) {
      Powers<T> all{};
      each<EACH>([&](int e) {
        const int64_t c = (g * EACH + e) * call.features / (GROUPS * EACH) - first_feature;
        each<PACKS>([&](int k) {
          const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from[k] + c * call.feature_stride);
          each<N>([&](int i) { add(all, keeps(k * N + i) ? fma(T(widen(pack.value[i])), unit.scale, base) : T(0)); });
        });
      });
      const T inverse = T(1) / T(EACH * larger(1, __popc(kept)));
      quiet = smaller(quiet, (all.s2 - all.s1 * all.s1 * inverse) * inverse), mean += all.s2 * inverse / GROUPS;
    });
    limit = kept ? sqrt(T(plan.reach_squared) * larger(quiet, mean / 32)) : T(INFINITY);  // no group is too quiet to be compared with
    lowest_limit = limit;
    for (int m = 1; m < 8; m *= 2) lowest_limit = smaller(lowest_limit, other_lane(lowest_limit, m));
  }

  // The shifts of the channels of a turn, four lanes each: the mean of middle values of the tile.
  __device__ void sample_channels(int c, T scale) const {
    const S* const mine = channel(0, smaller(c + lane / 4, features - 1));
    T values[4];
    each<4>([&](int s) { values[s] = widen(mine[samples[lane % 4 * 4 + s]]); });
    T middle = median(values[0], values[1], values[2], values[3]) / 4;
    for (int m = 1; m < 4; m *= 2) middle += other_lane(middle, m);
    if (lane % 4 == 0) shifts[c / FLUSH % 2 * FLUSH + lane / 4] = is_finite(middle * scale) ? middle : T(0);
  }
  // Positions side by side share what memory hands out at once, so they are sampled by fours.
  __device__ void choose_samples() const {
    const int64_t begin = tile * plan.tile_vectors, all = smaller(int64_t(plan.tile_vectors), call.vectors - begin);
    if (lane < SAMPLES) samples[lane] = offset_of(call, begin + smaller(all * (lane / 4) / 4 + lane % 4, all - 1));
    __syncwarp();
  }

  static __device__ Rest rest_of(const Powers<T>* part) { return bits_as<Rest>(part[PITCH / 2]); }
  static __device__ bool beyond(T low, T high, T scale, T base, T limit) { return larger(fma(high, scale, base), -fma(low, scale, base)) > limit; }
  // The lanes that go beyond their limit, of channel `lane` of a turn. Not inlined: in most turns there are none.
  static __device__ __noinline__ uint32_t mark(const Powers<T>* mine, T scale, T base, T limit) {
    uint32_t marks = 0;
    for (int r = 0; r < FLUSH; ++r) {
      T low, high;
      widen(rest_of(mine + r * PITCH).extremes, low, high);
      const unsigned all = __ballot_sync(ALL_LANES, beyond(low, high, scale, base, limit));
      if (int(threadIdx.x % 32) == r) marks = all;
    }
    return marks;
  }

  // What one warp does for the block in each turn: records the channels of the turn before, and samples those of the next.
  static __device__ __noinline__ void serve(const Plan& plan, int c, T scale) {
    const Channels block(plan);
    if (const int before = c - FLUSH; before >= 0) {
      Totals<T>* const totals = block.folded + before % (2 * FLUSH) * plan.warps;
      if (block.lane < FLUSH) totals[block.lane].shift = block.shifts[before % (2 * FLUSH) + block.lane];
      record_features<S>(block, block.first_feature + before, smaller(FLUSH, block.features - before), totals, FLUSH, scale);
    }
    __syncwarp();
    if (c + FLUSH < block.features) block.sample_channels(c + FLUSH, scale);
  }

  template <bool Fast>
  __device__ void send(Pack<S, N>* batch) {
    each<PACKS>([&](int k) {
      each<BATCH>([&](int r) {
        if (Fast || next + r < features) fetch(ring.at(batch, r, k), reinterpret_cast<const Pack<S, N>*>(from[k] + r * call.feature_stride));
      });
      from[k] += BATCH * call.feature_stride;
    });
    next += BATCH;
    __pipeline_commit();
  }

  // One channel: into the sums of the vectors, and as the lane's part of the channel.
  template <bool Plain, bool Whole>
  __device__ void step(int at, T shift) {
    if constexpr (!Whole) asm volatile("" : "+r"(kept));  // or the compiler keeps each bit in a register of its own
    Pair<S> pairs[C / 2], low = twice<S>(INFINITY), high = twice<S>(-INFINITY);
    T values[C], abs_sum = 0;
    ring.take(at, pairs, values);
    const T offset = Plain ? -shift : -(shift * unit.scale);
    Powers<T> mine{};
    each<C>([&](int i) {
      add(sums[i], Plain ? values[i] : fma(values[i], unit.scale, base));
      if (!Whole && !keeps(i)) return;
      const T d = Plain ? values[i] + offset : fma(values[i], unit.scale, offset);
      const T size = Plain ? T(fabs(values[i])) : T(fabs(values[i])) * unit.scale;
      i || !Whole ? add(mine, d) : begin(mine, d);
      abs_sum = i || !Whole ? abs_sum + size : size;
    });
    each<C / 2>([&](int k) {
      const Pair<S> counted = Whole ? pairs[k] : pairs[k].where(keeps(2 * k), keeps(2 * k + 1), twice<S>(NAN));  // a nan is passed over
      low = k || !Whole ? smaller(low, counted) : counted, high = k || !Whole ? larger(high, counted) : counted;
    });
    part[at * PITCH + lane] = mine;
    part[at * PITCH + PITCH / 2 + lane] = bits_as<Powers<T>>(Rest{abs_sum, Extremes<S>::of(low, high), 0});
  }
  // FLUSH channels. Fast: there are as many, and as many are to be sent for.
  template <bool Plain, bool Whole, bool Fast>
  __device__ void turn(int c) {
    each<2>([&](int u) {
      send<Fast>(ring.sent(u));
      ring.wait();
      const auto of_batch = *reinterpret_cast<const Pack<T, BATCH>*>(shift + u * BATCH);
      if constexpr (Fast) each<BATCH>([&](int r) { step<Plain, Whole>(u * BATCH + r, of_batch.value[r]); });
#pragma unroll 1
      for (int r = 0; !Fast && r < BATCH && c + u * BATCH + r < features; ++r) step<Plain, Whole>(u * BATCH + r, shift[u * BATCH + r]);
    });
    ring.next_turn();
    flush(Fast ? FLUSH : smaller(FLUSH, features - c));
    if (--turns_left < 0) serve(plan, c, unit.scale), turns_left = plan.warps - 1;
    shift += shift_step, shift_step = -shift_step, fold_to += fold_step, fold_step = -fold_step, marks_to += FLUSH;
    __syncthreads();
  }

  template <bool Plain, bool Whole>
  __device__ void walk() {
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) send<false>(ring.sent_before(s));
    for (int c = 0; c < features;) {
#pragma unroll 1
      for (; next + FLUSH <= features; c += FLUSH) turn<Plain, Whole, true>(c);
      if (c < features) turn<Plain, Whole, false>(c), c += FLUSH;
    }
  }

  // Adds up FLUSH channels over the warp: a lane has the parts of eight lanes of one channel.
  __device__ void flush(int channels) {
    __syncwarp();
    const Powers<T>* const parts = part + lane % FLUSH * PITCH + lane / FLUSH * 8;
    Powers<T> sums = parts[0];
    auto rest = rest_of(parts);
    for (int k = 1; k < 8; ++k) {
      const auto more = rest_of(parts + k);
      add(sums, parts[k]), rest.abs_sum += more.abs_sum, rest.extremes.add(more.extremes);
    }
    Totals<T> all{sums, rest.abs_sum};
    widen(rest.extremes, all.low, all.high);
    uint32_t marks = 0;
    if (__any_sync(ALL_LANES, beyond(all.low, all.high, unit.scale, base, lowest_limit)))
      marks = mark(part + lane, unit.scale, base, limit);
    for (int m = 8; m < 32; m *= 2) all.add_lane(m);
    if (lane < FLUSH) *fold_to = all;
    if (lane < channels) *marks_to = marks;
    __syncwarp();
  }

  __device__ void run() {
    start();
    const bool plain = unit.scale == 1 && unit.shift == 0;
    if (whole)
      plain ? walk<true, true>() : walk<false, true>();
    else
      walk<false, false>();
    if (warp == 0) serve(plan, (features - 1) / FLUSH * FLUSH + FLUSH, unit.scale);
    const T bound = limit * limit * limit * limit;
    const int64_t to = slab * call.vectors + first;
    each<C>([&](int i) {
      if (vector(i) < vectors) {
        static_cast<Powers<T>*>(plan.sums)[to + vector(i)] = sums[i];
        static_cast<Note<T>*>(plan.notes)[to + vector(i)] = {bound, 0};
      }
    });
  }
};

}  // namespace torchprobe::cuda
