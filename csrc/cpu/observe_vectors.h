// The sums of each vector over a block of features. Part of observe_kernel.h.
//
// The fast loops write the sums of the powers of (x − shift)·scale, with the mean of the block as the shift, to a Vectors. From the sums of all
// blocks, observe_kurtosis.h computes the kurtosis.

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float low = 0x1p-20f, high = 0x1p24f;  // the range in which the sum of fourth powers of scaled deviations is safe
  static constexpr float damp = 0x1p-32f;                 // a sum of finite values with this factor does not overflow
  static constexpr float strain = 22;                     // the sums of powers about a shift may be larger than those about the mean by this
};
template <>
struct Limits<double> {
  static constexpr double low = 0x1p-200, high = 0x1p200;
  static constexpr double damp = 0x1p-64, strain = 0x1p12;
};

template <class T>
constexpr double epsilon = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;  // the largest relative error of one rounding

// Sums that are added one after the other before they are added to the others. All roundings may go in the same direction, for example if all values
// are equal, and then the error grows with their number.
constexpr int RUN = 16;

// 2^-e with x·2^-e in [1, 2), for a finite and positive x. The result is a normal number.
template <class T>
T inverse_power(T x) {
  constexpr int bound = sizeof(T) == 4 ? 126 : 1022;
  const int e = __builtin_ilogb(x);
  return T(__builtin_ldexp(1.0, -(e < -bound ? -bound : e > bound ? bound : e)));
}
template <class T>
TORCHPROBE_INLINE bool is_finite(T x) {
  return x - x == 0;
}

// The largest |x − center| of n values; step is from one value to the next. Ignores nan.
template <class S, class T>
T largest_deviation(const S* x, int64_t n, int64_t step, T center) {
  constexpr int W = width<T>;
  T largest = 0;
  int64_t i = 0;
  if (step == 1) {
    Vec<T> lanes{};
    for (; i + W <= n; i += W) lanes = max(abs(load_wide(x + i) - splat<T>(center)), lanes);
    largest = reduce_max(lanes);
  }
  for (; i < n; ++i) {
    const T v = widen(x[i * step]), d = v > center ? v - center : center - v;
    largest = d > largest ? d : largest;
  }
  return largest;
}

// The sums over one block, from some vector on: arrays with one number for each vector.
template <class T>
struct Vectors {
  T* memory;
  int64_t room;

  TORCHPROBE_INLINE T* shift() const { return memory; }
  TORCHPROBE_INLINE T* s1() const { return memory + room; }
  TORCHPROBE_INLINE T* s2() const { return memory + 2 * room; }
  TORCHPROBE_INLINE T* s3() const { return memory + 3 * room; }
  TORCHPROBE_INLINE T* s4() const { return memory + 4 * room; }
  TORCHPROBE_INLINE T* peak() const { return memory + 5 * room; }  // an upper bound of the fourth powers of the vector
};

// The sums over all blocks.
template <class T>
struct Sums {
  T* memory;
  int64_t room;  // vectors

  // Those over block b, from vector r on.
  TORCHPROBE_INLINE Vectors<T> of(int64_t b, int64_t r) const { return {memory + b * SUMS * room + r, room}; }
};

// ---- the sums, features contiguous -------------------------------------------------------------------------------------------------------

// The sum of x·factor over one vector, in the order of row_powers. Also copies x to `to` if x is not of type T.
template <class S, class T>
T row_sum(const S* x, int64_t n, T factor, T* to) {
  constexpr int W = width<T>;
  Vec<T> a{}, b{};
  const Vec<T> f = splat<T>(factor);
  auto take = [&](Vec<T> v, int64_t i) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<S, T>) store(to + i, v);
    return v * f;
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    a += take(load_wide(x + i), i);
    b += take(load_wide(x + i + W), i + W);
  }
  if (i + W <= n) a += take(load_wide(x + i), i), i += W;
  if (i < n) b += take(load_part<S>(x + i, n - i, 0), i);
  return reduce(a + b);
}

// The sums of the powers of deviations, in every lane.
template <class T>
struct Powers {
  Vec<T> s1, s2, s3, s4;

  TORCHPROBE_INLINE void add(Vec<T> d) {
    const Vec<T> q = d * d;
    s1 += d;
    s2 += q;
    s3 = fma(q, d, s3);
    s4 = fma(q, q, s4);
  }
  TORCHPROBE_INLINE void add_all(const Powers& a, const Powers& b) { s1 += a.s1 + b.s1, s2 += a.s2 + b.s2, s3 += a.s3 + b.s3, s4 += a.s4 + b.s4; }
};

// The sums of up to W vectors, before their lanes are added up.
template <class T>
struct VectorLanes {
  Lanes<T, 5> lanes;

  TORCHPROBE_INLINE void put(int r, const Powers<T>& sums, Vec<T> peak) {
    const int i = r % width<T>;
    lanes.of[0][i] = sums.s1, lanes.of[1][i] = sums.s2, lanes.of[2][i] = sums.s3, lanes.of[3][i] = sums.s4, lanes.of[4][i] = peak;
  }
  // After vector r: into v if W of them are there, or if it is the last.
  TORCHPROBE_INLINE void flush(int r, bool last, const Vectors<T>& v) {
    constexpr int W = width<T>;
    const int first = r - r % W, count = r - first + 1;
    if (count < W && !last) return;
    lanes.sum(0, count, v.s1() + first), lanes.sum(1, count, v.s2() + first), lanes.sum(2, count, v.s3() + first);
    lanes.sum(3, count, v.s4() + first), lanes.largest(4, count, v.peak() + first);
  }
};

// What deviations are from, and whether their scale is 1.
enum class About { Zero, ZeroUnscaled, Mean, MeanUnscaled };

// Sums the powers of (x − shift)·scale over vector r into `sums`. If they are about its mean, there is `next`, the vector that follows: it reads that at
// the same time, copies it to `to` if needed, and returns its sum. Otherwise it is x itself that is copied. It also prefetches every other cache line
// of `ahead`, a vector of the next strip; column_sums prefetches the rest.
template <About about, class S, class T, class X>
TORCHPROBE_INLINE T row_powers(const X* x, int64_t n, T shift, T scale, const S* next, T* to, const S* ahead, VectorLanes<T>& sums, int r) {
  constexpr bool zero = about == About::Zero || about == About::ZeroUnscaled;
  constexpr int W = width<T>, LONGEST = 4 * RUN * W;  // elements before the lanes are added up
  const Vec<T> k = splat<T>(scale), s = splat<T>(about == About::Mean ? -(shift * scale) : shift);
  Vec<T> sum[2] = {};
  Powers<T> all{};
  Vec<T> peak{};
  auto copy = [&](Vec<T> v, int64_t i) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<S, T>) store(to + i, v);
    return v;
  };
  // An unscaled deviation takes a subtraction instead of the fused multiply-add: the adder has free cycles and the multiplier does not.
  auto deviation = [&](Vec<T> v) __attribute__((always_inline)) {
    return about == About::ZeroUnscaled ? v : about == About::Zero ? v * k : about == About::Mean ? fma(v, k, s) : v - s;
  };
  for (int64_t i = 0; i < n;) {
    Powers<T> powers[2] = {};
    auto step = [&](int64_t i, int v) __attribute__((always_inline)) {
      if constexpr (zero) {
        powers[v].add(deviation(copy(load_wide(x + i), i)));
      } else {
        sum[v] += copy(load_wide(next + i), i);
        powers[v].add(deviation(load_wide(x + i)));
      }
    };
    const int64_t end = n - i < LONGEST ? n : i + LONGEST;
    for (; i + 2 * W <= end; i += 2 * W) {
      prefetch(ahead + i);
      step(i, 0);
      step(i + W, 1);
    }
    if (i + W <= end) step(i, 0), i += W;
    if (i < end) {
      if constexpr (zero) {
        powers[1].add(deviation(copy(load_part<X>(x + i, end - i, 0), i)));
      } else {
        sum[1] += copy(load_part<S>(next + i, end - i, 0), i);
        powers[1].add(deviation(load_part<X>(x + i, end - i, shift)));  // a deviation of 0 adds nothing
      }
      i = end;
    }
    all.add_all(powers[0], powers[1]);
    peak = max(peak, max(powers[0].s4, powers[1].s4));
  }
  sums.put(r, all, peak);
  return zero ? T(0) : reduce(sum[0] + sum[1]);
}

// Whether the mean of a sample is so small that sums about 0 do for all: at most ⅗ of its standard deviation in every lane, or in all lanes together.
// load(i) is the i-th of n registers; not more than MOST of them are read.
template <class T, bool Together, class F>
TORCHPROBE_INLINE bool near_zero(int64_t n, F load) {
  constexpr int64_t MOST = Together ? 32 : 256;
  const int64_t step = (n + MOST - 1) / MOST;
  const T largest = n > 0 ? reduce_max(abs(load(0))) : 0;
  const Vec<T> k = splat<T>(largest > 0 && is_finite(largest) ? inverse_power<T>(largest) : T(1));  // so that the scale changes no decision
  Vec<T> s1{}, s2{};
  int64_t read = 0;
  for (int64_t i = 0; i < n; i += step, ++read) {
    const Vec<T> v = load(i) * k;
    s1 += v;
    s2 = fma(v, v, s2);
  }
  constexpr T share = T(0.26);
  if (Together) {
    const T sum = reduce(s1);
    return sum * sum <= share * T(read * width<T>) * reduce(s2);
  }
  return !any(~(s1 * s1 <= share * T(read) * s2));
}

// The sums of n features of several rows. Also copies from[r] to row[r] if it is not of type T.
template <class S, class T>
TORCHPROBE_INLINE void row_sums(const S* const* from, T* const* row, const S* const* ahead, int rows, int64_t n, T scale, const Vectors<T>& v) {
  constexpr int W = width<T>;
  VectorLanes<T> sums;
  auto sample = [&](int r) { return near_zero<T, true>(n / W, [&](int64_t i) { return load_wide(from[r] + i * W); }); };
  if (rows >= 8 && n >= W && sample(0) && sample(rows / 2)) {
    for (int r = 0; r < rows; ++r) {
      if (scale == 1)
        row_powers<About::ZeroUnscaled, S, T>(from[r], n, T(0), T(1), from[r], row[r], ahead[r], sums, r);
      else
        row_powers<About::Zero, S, T>(from[r], n, T(0), scale, from[r], row[r], ahead[r], sums, r);
      v.shift()[r] = 0, sums.flush(r, r + 1 == rows, v);
    }
    return;
  }
  const T inverse_n = T(1.0 / double(n));
  T sum = row_sum<S, T>(from[0], n, 1, row[0]);
  for (int r = 0; r < rows; ++r) {
    const T shift = sum * inverse_n;
    const int next = r + 1 < rows ? r + 1 : r;
    sum = scale == 1 ? row_powers<About::MeanUnscaled, S, T>(row[r], n, shift, T(1), from[next], row[next], ahead[r], sums, r)
                     : row_powers<About::Mean, S, T>(row[r], n, shift, scale, from[next], row[next], ahead[r], sums, r);
    v.shift()[r] = shift, sums.flush(r, r + 1 == rows, v);
  }
}

// ---- the sums, neighboring vectors contiguous --------------------------------------------------------------------------------------------

constexpr int PEAK_BLOCK = 32;  // features; the sum of their fourth powers bounds the largest one
constexpr int PIECE = 8 * PEAK_BLOCK;  // features whose sums are added before they are added to the others: see RUN

// Calls f(r, V, lanes) for all vectors, V registers from vector r on at a time. Of the last register only `lanes` may be in use.
template <class T, class F>
TORCHPROBE_INLINE void each_register(int vectors, F f) {
  constexpr int W = width<T>, V = REGISTERS == 32 ? 4 : 2;
  int r = 0;
  for (; r + V * W <= vectors; r += V * W) f(r, std::integral_constant<int, V>(), W);
  for (; r < vectors; r += W) f(r, std::integral_constant<int, 1>(), vectors - r < W ? vectors - r : W);
}
template <class S>
TORCHPROBE_INLINE auto load_lanes(const S* p, int lanes) {
  return lanes < width<decltype(widen(*p))> ? load_part<S>(p, lanes, 0) : load_wide(p);
}

template <class T>
TORCHPROBE_INLINE void clear(const Vectors<T>& v, int vectors) {
  for (T* p : {v.s1(), v.s2(), v.s3(), v.s4(), v.peak()})
    for (int r = 0; r < vectors; r += width<T>) store(p + r, Vec<T>{});
}

// The shifts of several vectors with n features, where element j of vector r is x[j·stride + r]: 0 or the means. Returns whether they are 0.
template <class S, class T>
TORCHPROBE_INLINE bool side_by_side_shifts(const S* x, int64_t stride, int vectors, int64_t n, const Vectors<T>& v) {
  constexpr int W = width<T>;
  const S* sample = x + (vectors / 2 + W <= vectors ? vectors / 2 : 0);
  const bool zero = vectors >= W && near_zero<T, false>(n, [&](int64_t j) { return load_wide(sample + j * stride); });
  const Vec<T> inverse_n = splat<T>(T(1.0 / double(n)));
  each_register<T>(vectors, [&](int r, auto registers, int lanes) __attribute__((always_inline)) {
    constexpr int V = decltype(registers)::value;
    Vec<T> sum[V] = {};
    for (int64_t j = 0; j < (zero ? 0 : n); ++j)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[i] += load_lanes(x + j * stride + r + i * W, lanes);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(v.shift() + r + i * W, sum[i] * inverse_n);
  });
  clear(v, vectors);
  return zero;
}

// Adds the powers of n features, at most PEAK_BLOCK, of several vectors to `piece`, and widens the peaks of v. v has the shifts.
template <About about, class S, class T>
TORCHPROBE_INLINE void side_by_side_powers(const S* x, const S* ahead, int64_t stride, int vectors, int64_t n, T scale, const Vectors<T>& v,
                                           const Vectors<T>& piece) {
  constexpr int W = width<T>;
  const Vec<T> k = splat<T>(scale);
  each_register<T>(vectors, [&](int r, auto registers, int lanes) __attribute__((always_inline)) {
    constexpr int V = decltype(registers)::value;
    Vec<T> s[V];
    Powers<T> powers[V] = {};
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) s[i] = -(load(v.shift() + r + i * W) * k);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        if (i % 2) prefetch(ahead + j * stride + r + i * W);
        const Vec<T> x_i = load_lanes(x + j * stride + r + i * W, lanes);
        powers[i].add(about == About::ZeroUnscaled ? x_i : about == About::Zero ? x_i * k : fma(x_i, k, s[i]));
      }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const int at = r + i * W;
      add_to(piece.s1() + at, powers[i].s1);
      add_to(piece.s2() + at, powers[i].s2);
      add_to(piece.s3() + at, powers[i].s3);
      add_to(piece.s4() + at, powers[i].s4);
      store(v.peak() + at, max(load(v.peak() + at), powers[i].s4));
    }
  });
}

// Adds the sums of a piece to those of all, and clears them.
template <class T>
TORCHPROBE_INLINE void add_piece(const Vectors<T>& all, const Vectors<T>& piece, int vectors) {
  for (int p = 1; p < SUMS - 1; ++p)
    for (int r = 0; r < vectors; r += width<T>) add_to(all.memory + p * all.room + r, load(piece.memory + p * piece.room + r));
  clear(piece, vectors);
}

// The sums of one vector, with the arithmetic of side_by_side_powers.
template <class T>
void lone_powers(const T* x, int64_t n, T shift, T scale, const Vectors<T>& v) {
  T sums[4] = {}, peak = 0;
  const T s = -(shift * scale);
  for (int64_t piece = 0; piece < n; piece += PIECE) {
    T all[4] = {};
    for (int64_t begin = piece; begin < n && begin < piece + PIECE; begin += PEAK_BLOCK) {
      T block[4] = {};
      for (int64_t j = begin; j < n && j < begin + PEAK_BLOCK; ++j) {
        const T d = fma(x[j], scale, s), q = d * d;
        block[0] += d;
        block[1] += q;
        block[2] = fma(q, d, block[2]);
        block[3] = fma(q, q, block[3]);
      }
      for (int p = 0; p < 4; ++p) all[p] += block[p];
      peak = max(peak, block[3]);
    }
    for (int p = 0; p < 4; ++p) sums[p] += all[p];
  }
  *v.shift() = shift, *v.s1() = sums[0], *v.s2() = sums[1], *v.s3() = sums[2], *v.s4() = sums[3], *v.peak() = peak;
}
