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
};
template <>
struct Limits<double> {
  static constexpr double low = 0x1p-200, high = 0x1p200;
  static constexpr double damp = 0x1p-64;
};

template <class T>
constexpr double epsilon = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;  // the largest relative error of one rounding

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

// Sums the powers of (x − shift)·scale over one vector into v[r]. At the same time it reads `next`, the vector that follows, copies it to `to` if
// needed, and returns its sum. It also prefetches every other cache line of `ahead`, a vector of the next strip; column_sums prefetches the rest.
// With Plain the scale is 1, and a subtraction replaces the fused multiply-add: the adder has free cycles and the multiplier does not.
template <class S, class T, bool Plain>
TORCHPROBE_INLINE T row_powers(const T* x, int64_t n, T shift, T scale, const S* next, T* to, const S* ahead, const Vectors<T>& v, int r) {
  constexpr int W = width<T>;
  const Vec<T> k = splat<T>(scale), s = splat<T>(Plain ? shift : -(shift * scale));
  Vec<T> sum_a{}, sum_b{}, a1{}, a2{}, a3{}, a4{}, b1{}, b2{}, b3{}, b4{};
  auto take = [&](Vec<T> v, int64_t i) __attribute__((always_inline)) {
    if constexpr (!std::is_same_v<S, T>) store(to + i, v);
    return v;
  };
  auto add = [&](Vec<T> v, Vec<T>& s1, Vec<T>& s2, Vec<T>& s3, Vec<T>& s4) __attribute__((always_inline)) {
    const Vec<T> d = Plain ? v - s : fma(v, k, s), q = d * d;
    s1 += d;
    s2 += q;
    s3 = fma(q, d, s3);
    s4 = fma(q, q, s4);
  };
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    prefetch(ahead + i);
    sum_a += take(load_wide(next + i), i);
    add(load(x + i), a1, a2, a3, a4);
    sum_b += take(load_wide(next + i + W), i + W);
    add(load(x + i + W), b1, b2, b3, b4);
  }
  if (i + W <= n) {
    sum_a += take(load_wide(next + i), i);
    add(load(x + i), a1, a2, a3, a4);
    i += W;
  }
  if (i < n) {
    sum_b += take(load_part<S>(next + i, n - i, 0), i);
    add(load_part<T>(x + i, n - i, shift), b1, b2, b3, b4);  // a deviation of 0 adds nothing
  }
  const Four sums = reduce4(a1 + b1, a2 + b2, a3 + b3, a4 + b4);
  v.shift()[r] = shift, v.s1()[r] = T(sums.a), v.s2()[r] = T(sums.b), v.s3()[r] = T(sums.c), v.s4()[r] = T(sums.d);
  v.peak()[r] = reduce_max(max(a4, b4));
  return reduce(sum_a + sum_b);
}

// The sums of n features of several rows. Also copies from[r] to row[r] if it is not of type T.
template <class S, class T>
TORCHPROBE_INLINE void row_sums(const S* const* from, T* const* row, const S* const* ahead, int rows, int64_t n, T scale, const Vectors<T>& v) {
  const T inverse_n = T(1.0 / double(n));
  T sum = row_sum<S, T>(from[0], n, 1, row[0]);
  for (int r = 0; r < rows; ++r) {
    const T shift = sum * inverse_n;
    const int next = r + 1 < rows ? r + 1 : r;
    sum = scale == 1 ? row_powers<S, T, true>(row[r], n, shift, 1, from[next], row[next], ahead[r], v, r)
                     : row_powers<S, T, false>(row[r], n, shift, scale, from[next], row[next], ahead[r], v, r);
  }
}

// ---- the sums, neighboring vectors contiguous --------------------------------------------------------------------------------------------

constexpr int PEAK_BLOCK = 32;  // features; the sum of their fourth powers bounds the largest one

// V·W vectors at once, feature by feature. Of the last register only `lanes` may be in use.
template <class S, class T, int V>
TORCHPROBE_INLINE void side_by_side(const S* x, const S* ahead, int64_t stride, int lanes, int64_t n, T scale, const Vectors<T>& v, int at) {
  constexpr int W = width<T>;
  auto get = [&](const S* p, int i) __attribute__((always_inline)) {
    return i == V - 1 && lanes < W ? load_part<S>(p + i * W, lanes, 0) : load_wide(p + i * W);
  };
  Vec<T> sum[V] = {};
  for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) sum[i] += get(x + j * stride, i);
  const Vec<T> k = splat<T>(scale), inverse_n = splat<T>(T(1.0 / double(n)));
  Vec<T> s[V], s1[V] = {}, s2[V] = {}, s3[V] = {}, s4[V] = {}, peak[V] = {};
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    const Vec<T> shift = sum[i] * inverse_n;
    store(v.shift() + at + i * W, shift);
    s[i] = -(shift * k);
  }
  for (int64_t begin = 0; begin < n; begin += PEAK_BLOCK) {
    const int64_t end = n - begin < PEAK_BLOCK ? n : begin + PEAK_BLOCK;
    Vec<T> block[V] = {};
    for (int64_t j = begin; j < end; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) {
        if (i % 2) prefetch(ahead + j * stride + i * W);
        const Vec<T> d = fma(get(x + j * stride, i), k, s[i]), q = d * d;
        s1[i] += d;
        s2[i] += q;
        s3[i] = fma(q, d, s3[i]);
        block[i] = fma(q, q, block[i]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) s4[i] += block[i], peak[i] = max(peak[i], block[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    store(v.s1() + at + i * W, s1[i]);
    store(v.s2() + at + i * W, s2[i]);
    store(v.s3() + at + i * W, s3[i]);
    store(v.s4() + at + i * W, s4[i]);
    store(v.peak() + at + i * W, peak[i]);
  }
}

// The sums of n features of several vectors: element j of vector r is x[j·stride + r].
template <class S, class T>
TORCHPROBE_INLINE void side_by_side_sums(const S* x, const S* ahead, int64_t stride, int vectors, int64_t n, T scale, const Vectors<T>& v) {
  constexpr int W = width<T>, V = REGISTERS == 32 ? 4 : 2;
  int r = 0;
  for (; r + V * W <= vectors; r += V * W) side_by_side<S, T, V>(x + r, ahead + r, stride, W, n, scale, v, r);
  for (; r < vectors; r += W) side_by_side<S, T, 1>(x + r, ahead + r, stride, vectors - r < W ? vectors - r : W, n, scale, v, r);
}

// The sums of one vector, with the arithmetic of side_by_side.
template <class T>
void lone_powers(const T* x, int64_t n, T shift, T scale, const Vectors<T>& v) {
  T s1 = 0, s2 = 0, s3 = 0, s4 = 0, peak = 0;
  const T s = -(shift * scale);
  for (int64_t begin = 0; begin < n; begin += PEAK_BLOCK) {
    T block = 0;
    for (int64_t j = begin; j < n && j < begin + PEAK_BLOCK; ++j) {
      const T d = fma(x[j], scale, s), q = d * d;
      s1 += d;
      s2 += q;
      s3 = fma(q, d, s3);
      block = fma(q, q, block);
    }
    s4 += block;
    peak = block > peak ? block : peak;
  }
  *v.shift() = shift, *v.s1() = s1, *v.s2() = s2, *v.s3() = s3, *v.s4() = s4, *v.peak() = peak;
}
