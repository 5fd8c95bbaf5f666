// The kernels of exponents_ for one instruction set; included between isa_begin.h and isa_end.h, inside a namespace.
//
// The exponents of four vectors are packed as the bytes of one, and counted as bits (exponents_counters.h). Few activations are outside of a window of
// 16 octaves, which the first values place; these, and what is not finite, are looked at separately. If they are not few, the window moves to the
// largest values, and one below it is added. Eight rows are read together: the largest values of their columns stay in registers.

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using I = int32_t;
  static constexpr I magnitude = 0x7fffffff, infinity = 0x7f800000, least_normal = 0x00800000;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct FloatBits<double> {
  using I = int64_t;
  static constexpr I magnitude = 0x7fffffffffffffff, infinity = 0x7ff0000000000000, least_normal = 0x0010000000000000;
  static constexpr int mantissa = 52, bias = 1023;
};

template <class T>
TORCHPROBE_INLINE typename FloatBits<T>::I magnitude_bits(T value) {
  typename FloatBits<T>::I bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits & FloatBits<T>::magnitude;
}

// The bin of a value that is not 0, from the bits of its magnitude.
template <class T>
inline int bin_of(typename FloatBits<T>::I bits) {
  using B = FloatBits<T>;
  int exponent = int(bits >> B::mantissa) - B::bias;
  if (bits < B::least_normal) exponent = 63 - __builtin_clzll(uint64_t(bits)) - B::mantissa - B::bias + 1;  // subnormal
  const int bin = exponent - LOWEST_EXPONENT + 1;
  return bin < 0 ? 0 : bin > EXPONENT_BINS - 1 ? EXPONENT_BINS - 1 : bin;
}

// One value after the other, whatever it is.
template <class T, class S>
void add_plainly(const S* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, typename FloatBits<T>::I* across,
                 typename FloatBits<T>::I* largest) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const auto bits = magnitude_bits<T>(widen(x[r * stride + i]));
      if (bits >= FloatBits<T>::infinity) {
        ++counts.nonfinite;
        continue;
      }
      if (bits) ++counts.bins[bin_of<T>(bits)];
      if (bits > across[i]) across[i] = bits;
      if (bits > largest[r]) largest[r] = bits;
    }
  }
}

void add_double(const double* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int64_t* across, int64_t* largest, bool) {
  add_plainly<double>(x, stride, rows, n, counts, across, largest);
}

#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)

#include "exponents_counters.h"

TORCHPROBE_INLINE bool any_subnormal(const vint* bits) {
  vint least = bits[0] - 1;  // a zero becomes the largest number
  for (int v = 1; v < INPUT; ++v) least = smaller_unsigned(least, bits[v] - 1);
  return any((least >= 0) & (least < FloatBits<float>::least_normal - 1));
}

// One input: the bits of its magnitudes, and their exponents with bias as bytes, in another order.
struct Input {
  vint bits[INPUT];
  vbytes fields;
};

// Counts the values of an input that are `outside` of the windows that are always looked at, and not 0; takes nan and inf out of it.
__attribute__((noinline)) void add_others(ExponentCounts& counts, Input& input, uint64_t outside) {
  using B = FloatBits<float>;
  constexpr int W = width<float>, FEW = 4;  // which are counted one by one
  ++counts.others;
  if (any_subnormal(input.bits)) {
    int32_t lanes[W];
    for (int v = 0; v < INPUT; ++v) {
      store_int(lanes, input.bits[v]);
      for (const int32_t lane : lanes)
        if (lane && lane < B::least_normal) ++counts.bins[bin_of<float>(lane)];
    }
  }
  unsigned char field[VECTOR_BYTES];
  store_int(field, (vint)input.fields);
  while (outside) {
    const uint64_t one = outside & -outside;
    const int exponent = field[__builtin_ctzll(outside)];
    const int window = (exponent - counts.first + WINDOW) / WINDOW;
    if (exponent == B::infinity >> B::mantissa) {
      ++counts.nonfinite;
      outside &= ~one;
    } else if (window == 0 || top_of(counts, window) > LARGEST_TOP || __builtin_popcountll(outside) <= FEW) {
      ++counts.bins[exponent - B::bias - LOWEST_EXPONENT + 1];
      outside &= ~one;
    } else {
      const vbytes places = places_below(top_bytes(counts, window), input.fields);
      add_places(counts, window, places);
      outside &= highest_bits(places);
    }
  }
  for (int v = 0; v < INPUT; ++v) input.bits[v] |= input.bits[v] >= B::infinity;  // −1
  input.fields &= ~(vbytes)(input.fields == 0xff);
}

// The windows of a loop: the usual one, and with WIDE the one below it.
template <bool WIDE>
struct Windows {
  static constexpr int N = 1 + WIDE;
  Counters counters[N];
  vbytes tops[N];
};

// The bits of one input in each of the windows.
template <bool WIDE, class S>
TORCHPROBE_INLINE void read_input(const S* x, const S* next, ExponentCounts& counts, const Windows<WIDE>& windows, vint* across, vbytes& most,
                                  Halves* found) {
  constexpr int W = width<float>;
  Input input;
  for (int v = 0; v < INPUT; ++v) {
    if (v * W * sizeof(S) % 64 == 0) __builtin_prefetch(next + v * W);
    input.bits[v] = (vint)load_wide(x + v * W) & FloatBits<float>::magnitude;
  }
  input.fields = pack_bytes(input.bits[0] >> 23, input.bits[1] >> 23, input.bits[2] >> 23, input.bits[3] >> 23);
  vbytes outside_of = ~vbytes{};
  for (int w = 0; w < Windows<WIDE>::N; ++w) {
    const vbytes places = places_below(windows.tops[w], input.fields);
    outside_of &= places;
    found[w] = bits_of(places);
  }
  if (uint64_t outside = highest_bits(outside_of)) {
    const uint64_t zeros = zero_bytes(input.fields);
    outside &= ~zeros;
    if (outside || (zeros && any_subnormal(input.bits))) {
      Input copy = input;  // the values themselves stay in registers
      add_others(counts, copy, outside);
      input = copy;
    }
  }
  most = larger(most, input.fields);
  for (int v = 0; v < INPUT; ++v) across[v] = larger(across[v], input.bits[v]);
}

// Two rows of an input, or one; the bits of weight 2.
template <bool WIDE, class S>
TORCHPROBE_INLINE void read_pair(const S* x, int64_t stride, bool both, int64_t ahead, ExponentCounts& counts, Windows<WIDE>& windows, vint* across,
                                 vbytes* most, Halves* twos) {
  Halves first[Windows<WIDE>::N], second[Windows<WIDE>::N] = {};
  read_input<WIDE>(x, x + ahead, counts, windows, across, most[0], first);
  if (both) read_input<WIDE>(x + stride, x + stride + ahead, counts, windows, across, most[1], second);
  for (int w = 0; w < Windows<WIDE>::N; ++w) twos[w] = add_carry(windows.counters[w].ones, first[w], second[w]);
}

// At most four rows of it; the bits of weight 4.
template <bool WIDE, class S>
TORCHPROBE_INLINE void read_four(const S* x, int64_t stride, int64_t rows, int64_t ahead, ExponentCounts& counts, Windows<WIDE>& windows,
                                 vint* across, vbytes* most, Halves* fours) {
  Halves first[Windows<WIDE>::N], second[Windows<WIDE>::N] = {};
  read_pair<WIDE>(x, stride, rows > 1, ahead, counts, windows, across, most, first);
  if (rows > 2) read_pair<WIDE>(x + 2 * stride, stride, rows > 3, ahead, counts, windows, across, most + 2, second);
  for (int w = 0; w < Windows<WIDE>::N; ++w) fours[w] = add_carry(windows.counters[w].twos, first[w], second[w]);
}

// The same INPUT_VALUES columns of at most MOST_ROWS rows; those `ahead` are fetched.
template <bool WIDE, class S>
TORCHPROBE_INLINE void add_columns(const S* x, int64_t stride, int64_t rows, int64_t ahead, ExponentCounts& counts, int32_t* across,
                                   Windows<WIDE>& windows, vbytes* most) {
  static_assert(MOST_ROWS == 8);
  vint columns[INPUT];
  for (int v = 0; v < INPUT; ++v) columns[v] = load_int(across + v * width<float>);
  Halves first[Windows<WIDE>::N], second[Windows<WIDE>::N] = {};
  read_four<WIDE>(x, stride, rows, ahead, counts, windows, columns, most, first);
  if (rows > 4) read_four<WIDE>(x + 4 * stride, stride, rows - 4, ahead, counts, windows, columns, most + 4, second);
  for (int w = 0; w < Windows<WIDE>::N; ++w) add_eights(counts, counts.usual - w, add_carry(windows.counters[w].fours, first[w], second[w]));
  for (int v = 0; v < INPUT; ++v) store_int(across + v * width<float>, columns[v]);
}

// The bits of the largest finite magnitude; −1 if there is none.
template <class S>
int32_t largest_finite(const S* x, int64_t n) {
  int32_t most = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = magnitude_bits<float>(widen(x[i]));
    const int32_t finite = bits < FloatBits<float>::infinity ? bits : -1;
    most = most > finite ? most : finite;
  }
  return most;
}

// At most MOST_ROWS rows.
template <bool WIDE, class S>
TORCHPROBE_INLINE void add_rows(const S* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest,
                                bool octaves) {
  Windows<WIDE> windows;
  for (int w = 0; w < Windows<WIDE>::N; ++w) {
    windows.counters[w] = begin_window(counts.windows[counts.usual - w]);
    windows.tops[w] = top_bytes(counts, counts.usual - w);
  }
  vbytes most[MOST_ROWS] = {};
  int64_t i = 0;
  for (; i + INPUT_VALUES <= n; i += INPUT_VALUES) add_columns<WIDE>(x + i, stride, rows, rows * stride, counts, across + i, windows, most);
  if (i < n) {
    S rest[MOST_ROWS * INPUT_VALUES] = {};
    int32_t rest_across[INPUT_VALUES] = {};
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(rest + r * INPUT_VALUES, x + r * stride + i, size_t(n - i) * sizeof(S));
    __builtin_memcpy(rest_across, across + i, size_t(n - i) * sizeof(int32_t));
    add_columns<WIDE>(rest, INPUT_VALUES, rows, 0, counts, rest_across, windows, most);
    __builtin_memcpy(across + i, rest_across, size_t(n - i) * sizeof(int32_t));
  }
  for (int w = 0; w < Windows<WIDE>::N; ++w) leave_window(counts.windows[counts.usual - w], windows.counters[w]);
  for (int64_t r = 0; r < rows; ++r) {
    unsigned char fields[VECTOR_BYTES], top = 0;
    store_int(fields, (vint)most[r]);
    for (const unsigned char field : fields) top = top > field ? top : field;
    // Where the largest value is subnormal, its exponent is not told by the field.
    const int32_t peak = octaves && top ? int32_t(top) << FloatBits<float>::mantissa : largest_finite(x + r * stride, n);
    largest[r] = largest[r] > peak ? largest[r] : peak;
  }
}

void place_windows(ExponentCounts& counts, int top) {
  top = top > LARGEST_TOP ? LARGEST_TOP : top < WINDOW ? WINDOW : top;
  counts.first = (top - WINDOW) % WINDOW + 1;
  counts.usual = (top - WINDOW) / WINDOW + 1;
}

// The exponent, with its bias, that nine tenths of the first values do not exceed.
template <class S>
int most_exponents(const S* x, int64_t n) {
  using B = FloatBits<float>;
  int found[256] = {}, all = 0, below = 0;
  for (int64_t i = 0; i < n && i < INPUT_VALUES; ++i) {
    const int32_t bits = magnitude_bits<float>(widen(x[i]));
    if (bits >= B::least_normal && bits < B::infinity) ++found[bits >> B::mantissa], ++all;
  }
  for (int field = 0; field < 256; ++field)
    if ((below += found[field]) * 10 > all * 9) return field;
  return B::bias;
}

template <class S>
void add_fast(const S* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest, bool octaves) {
  if (!counts.first) place_windows(counts, most_exponents(x, n) + 2);
  for (int64_t r = 0; r < rows; r += MOST_ROWS) {
    const int64_t some = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
    counts.others = 0;
    if (counts.wide && counts.usual > 1) add_rows<true>(x + r * stride, stride, some, n, counts, across, largest + r, octaves);
    else add_rows<false>(x + r * stride, stride, some, n, counts, across, largest + r, octaves);
    int32_t peak = -1;
    for (int64_t i = r; i < r + some; ++i) peak = peak > largest[i] ? peak : largest[i];
    if (counts.others * 4 * INPUT_VALUES > n * some && counts.moves < MOST_MOVES && peak >= FloatBits<float>::least_normal) {  // far apart
      for (int window = 0; window < WINDOWS; ++window) empty_window(counts, window);
      place_windows(counts, (peak >> FloatBits<float>::mantissa) + 1);
      counts.wide = true;
      ++counts.moves;
    }
  }
}

void add_float(const float* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest,
               bool octaves) {
  add_fast(x, stride, rows, n, counts, across, largest, octaves);
}
void add_bfloat16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest,
                  bool octaves) {
  add_fast(static_cast<const BFloat16*>(x), stride, rows, n, counts, across, largest, octaves);
}
void add_float16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest,
                 bool octaves) {
  add_fast(static_cast<const Float16*>(x), stride, rows, n, counts, across, largest, octaves);
}
void finish_counts(ExponentCounts& counts) {
  for (int window = 0; window < WINDOWS; ++window) empty_window(counts, window);
}

#else

void add_float(const float* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest, bool) {
  add_plainly<float>(x, stride, rows, n, counts, across, largest);
}
void add_bfloat16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest, bool) {
  add_plainly<float>(static_cast<const BFloat16*>(x), stride, rows, n, counts, across, largest);
}
void add_float16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest, bool) {
  add_plainly<float>(static_cast<const Float16*>(x), stride, rows, n, counts, across, largest);
}
void finish_counts(ExponentCounts&) {}

#endif

constexpr ExponentKernels exponent_kernels() { return {add_double, add_float, add_bfloat16, add_float16, finish_counts}; }
