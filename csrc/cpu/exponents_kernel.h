// The kernels of exponents_ for one instruction set; included between isa_begin.h and isa_end.h, inside a namespace.
//
// The exponents of four vectors are gathered as the bytes of one. Two lookups in a register (pshufb) then turn each byte into 16 bits, one of which
// is set: how far it is below the largest exponent of a window. So the count of an exponent is the number of set bits at a place, which
// carry-save adders keep (Harley & Seal; Muła, Kurz & Lemire, Computer Journal 61(1), 2018): vectors of bits of equal weight are added three at a
// time to one of that weight and one of twice of it. Few activations are outside of a window of 16 octaves, which the first values place; these,
// and what is not finite, are looked at separately. If they are not few, the window moves to the largest values, and one below it is added.

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

void add_double(const double* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int64_t* across, int64_t* largest) {
  add_plainly<double>(x, stride, rows, n, counts, across, largest);
}

#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)

typedef unsigned char vbytes __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t vunsigned __attribute__((vector_size(VECTOR_BYTES)));
constexpr int INPUT = 4, INPUT_VALUES = INPUT * width<float>;  // vectors, and values, whose exponents fill one vector with bytes
constexpr unsigned char WITHIN = 0x80 - WINDOW;                // added to a distance below WINDOW, the highest bit stays 0

#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE vint larger(vint a, vint b) { return (vint)_mm512_max_epi32((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vbytes add_saturated(vbytes a, vbytes b) { return (vbytes)_mm512_adds_epu8((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vint look_up(__m128i table, vbytes places) {
  return (vint)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), (__m512i)places);
}
TORCHPROBE_INLINE uint64_t highest_bits(vbytes v) { return _mm512_movepi8_mask((__m512i)v); }
TORCHPROBE_INLINE uint64_t zero_bytes(vbytes v) { return _mm512_testn_epi8_mask((__m512i)v, (__m512i)v); }
TORCHPROBE_INLINE int32_t largest_lane(vint v) { return _mm512_reduce_max_epi32((__m512i)v); }
// a where the mask is set, b elsewhere; the sum and the carry of three bits.
TORCHPROBE_INLINE vint select(int mask, vint a, vint b) {
  return (vint)_mm512_ternarylogic_epi32((__m512i)(vint{} + mask), (__m512i)a, (__m512i)b, 0xca);
}
TORCHPROBE_INLINE vint sum_bit(vint a, vint b, vint c) { return (vint)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96); }
TORCHPROBE_INLINE vint carry_bit(vint a, vint b, vint c) { return (vint)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0xe8); }
#else
TORCHPROBE_INLINE vint larger(vint a, vint b) { return (vint)_mm256_max_epi32((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vbytes add_saturated(vbytes a, vbytes b) { return (vbytes)_mm256_adds_epu8((__m256i)a, (__m256i)b); }
TORCHPROBE_INLINE vint look_up(__m128i table, vbytes places) {
  return (vint)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), (__m256i)places);
}
TORCHPROBE_INLINE uint64_t highest_bits(vbytes v) { return uint32_t(_mm256_movemask_epi8((__m256i)v)); }
TORCHPROBE_INLINE uint64_t zero_bytes(vbytes v) { return highest_bits((vbytes)_mm256_cmpeq_epi8((__m256i)v, __m256i{})); }
TORCHPROBE_INLINE int32_t largest_lane(vint v) { return reduce_max(v); }
TORCHPROBE_INLINE vint select(int mask, vint a, vint b) { return (a & mask) | (b & ~mask); }
TORCHPROBE_INLINE vint sum_bit(vint a, vint b, vint c) { return a ^ b ^ c; }
TORCHPROBE_INLINE vint carry_bit(vint a, vint b, vint c) { return (a & b) | (c & (a ^ b)); }
#endif
TORCHPROBE_INLINE vint load_int(const void* p) {
  vint v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
TORCHPROBE_INLINE void store_int(void* p, vint v) { __builtin_memcpy(p, &v, sizeof v); }

// The largest exponent of a window, with its bias.
TORCHPROBE_INLINE int top_of(const ExponentCounts& counts, int window) { return counts.first + WINDOW * window - 1; }

// The sum of the bits at each place of a half, times the weight, to the bins.
TORCHPROBE_INLINE void add_bits(ExponentCounts& counts, int window, int half, const unsigned char* vector, int64_t weight) {
  uint64_t words[VECTOR_BYTES / 8];
  __builtin_memcpy(words, vector, sizeof words);
  for (int bit = 0; bit < 8; ++bit) {
    int64_t found = 0;
    for (const uint64_t word : words) found += __builtin_popcountll(word & 0x0101010101010101 << bit);
    const int field = top_of(counts, window) - 8 * half - bit;
    if (found) counts.bins[field - FloatBits<float>::bias - LOWEST_EXPONENT + 1] += found * weight;
  }
}

// Adds what is counted of one window to the bins.
void empty_window(ExponentCounts& counts, int window) {
  SlicedCounters& sliced = counts.windows[window];
  for (int half = 0; half < 2 && sliced.begun; ++half) {
    add_bits(counts, window, half, sliced.ones[half], 1);
    for (int level = 0; sliced.added >> level; ++level) {
      add_bits(counts, window, half, sliced.sums[level][half], int64_t(2) << level);
      if (sliced.added >> level & 1) add_bits(counts, window, half, sliced.waiting[level][half], int64_t(2) << level);
    }
  }
  sliced.added = 0;
  sliced.begun = false;
}

// The two halves of the places of an input, one bit in each byte of one of them; or bits of equal weight of many.
struct Halves {
  vint low, high;
};

TORCHPROBE_INLINE Halves bits_of(vbytes places) {
  return {look_up(_mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 0, 0, 0, 0, 0, 0, 0, 0), places),
          look_up(_mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, -128), places)};
}

// Adds b and c to a; returns the carry.
TORCHPROBE_INLINE Halves add_carry(Halves& a, Halves b, Halves c) {
  const Halves carry{carry_bit(a.low, b.low, c.low), carry_bit(a.high, b.high, c.high)};
  a = {sum_bit(a.low, b.low, c.low), sum_bit(a.high, b.high, c.high)};
  return carry;
}

TORCHPROBE_INLINE Halves load_halves(const unsigned char (&from)[2][COUNTER_BYTES]) { return {load_int(from[0]), load_int(from[1])}; }
TORCHPROBE_INLINE void store_halves(unsigned char (&to)[2][COUNTER_BYTES], Halves v) { store_int(to[0], v.low), store_int(to[1], v.high); }

// The bits of weight 1 of a window.
TORCHPROBE_INLINE Halves begin_window(SlicedCounters& sliced) {
  if (!sliced.begun) store_halves(sliced.ones, Halves{});
  sliced.begun = true;
  return load_halves(sliced.ones);
}

// Adds bits of weight 2 to the counters of a window.
TORCHPROBE_INLINE void add_twos(ExponentCounts& counts, int window, Halves twos) {
  SlicedCounters& sliced = counts.windows[window];
  const uint32_t before = sliced.added++;
  int level = 0;
  for (; before >> level & 1; ++level) {
    Halves sums = load_halves(sliced.sums[level]);
    twos = add_carry(sums, load_halves(sliced.waiting[level]), twos);
    store_halves(sliced.sums[level], sums);
  }
  store_halves(sliced.waiting[level], twos);
  if (!(before & (before + 1))) store_halves(sliced.sums[level], Halves{});  // the level is reached for the first time
  if (sliced.added == FULL) {  // the bits of weight 1 stay where they are
    const Halves ones = load_halves(sliced.ones);
    store_halves(sliced.ones, Halves{});
    empty_window(counts, window);
    store_halves(sliced.ones, ones);
    sliced.begun = true;
  }
}

// Adds one input to the counters of a window: the place of each byte in it, or a byte with the highest bit for those outside.
TORCHPROBE_INLINE void add_places(ExponentCounts& counts, int window, vbytes places) {
  Halves ones = begin_window(counts.windows[window]);
  const Halves twos = add_carry(ones, bits_of(places), Halves{});
  store_halves(counts.windows[window].ones, ones);
  add_twos(counts, window, twos);
}

TORCHPROBE_INLINE vbytes places_in(const ExponentCounts& counts, int window, vbytes fields) {
  return add_saturated((vbytes{} + (unsigned char)top_of(counts, window)) - fields, vbytes{} + WITHIN);
}

TORCHPROBE_INLINE bool any_subnormal(const vint* bits) {
  vint found{};
  for (int v = 0; v < INPUT; ++v) found |= (bits[v] != 0) & (bits[v] < FloatBits<float>::least_normal);
  return any(found);
}

// Counts the values of an input that are `outside` of the windows that are always looked at, and not 0; takes nan and inf out of it.
// Byte b belongs to lane b / 4 of vector b % 4.
__attribute__((noinline)) void add_others(ExponentCounts& counts, vint* bits, vbytes fields, uint64_t outside) {
  using B = FloatBits<float>;
  constexpr int W = width<float>, FEW = 4;  // which are counted one by one
  ++counts.others;
  if (any_subnormal(bits)) {
    int32_t lanes[W];
    for (int v = 0; v < INPUT; ++v) {
      store_int(lanes, bits[v]);
      for (const int32_t lane : lanes)
        if (lane && lane < B::least_normal) ++counts.bins[bin_of<float>(lane)];
    }
  }
  unsigned char field[VECTOR_BYTES];
  store_int(field, (vint)fields);
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
      const vbytes places = places_in(counts, window, fields);
      add_places(counts, window, places);
      outside &= highest_bits(places);
    }
  }
  for (int v = 0; v < INPUT; ++v) bits[v] |= bits[v] >= B::infinity;  // −1
}

// The bits of one input in the usual window. WIDE: the window below it is always looked at, too.
template <bool WIDE, class S>
TORCHPROBE_INLINE Halves read_input(const S* x, const S* next, ExponentCounts& counts, vint* across, int window, vint& most) {
  constexpr int W = width<float>;
  vint bits[INPUT];
  for (int v = 0; v < INPUT; ++v) {
    if (v * W * sizeof(S) % 64 == 0) __builtin_prefetch(next + v * W);
    bits[v] = (vint)load_wide(x + v * W) & FloatBits<float>::magnitude;
  }
  vint gathered = select(0x000000ff, bits[0] >> 23, bits[1] >> 15);
  gathered = select(0x0000ffff, gathered, bits[2] >> 7);
  const vbytes fields = (vbytes)select(0x00ffffff, gathered, (vint)((vunsigned)bits[3] << 1));
  const vbytes places = places_in(counts, window, fields);
  uint64_t outside = highest_bits(places);
  if (WIDE) {
    const vbytes below = places_in(counts, window - 1, fields);
    outside &= highest_bits(below);
    add_places(counts, window - 1, below);
  }
  if (outside) {
    const uint64_t zeros = zero_bytes(fields);
    outside &= ~zeros;
    if (outside || (zeros && any_subnormal(bits))) {
      vint copy[INPUT];  // the values themselves stay in registers
      for (int v = 0; v < INPUT; ++v) copy[v] = bits[v];
      add_others(counts, copy, fields, outside);
      for (int v = 0; v < INPUT; ++v) bits[v] = copy[v];
    }
  }
  for (int v = 0; v < INPUT; ++v) {
    most = larger(most, bits[v]);
    across[v] = larger(across[v], bits[v]);
  }
  return bits_of(places);
}

// The same INPUT_VALUES columns of some rows; those `ahead` are fetched.
template <bool WIDE, class S>
TORCHPROBE_INLINE void add_columns(const S* x, int64_t stride, int64_t rows, int64_t ahead, ExponentCounts& counts, int32_t* across, int window,
                                   Halves& ones, vint* most) {
  vint columns[INPUT];
  for (int v = 0; v < INPUT; ++v) columns[v] = load_int(across + v * width<float>);
  for (int64_t r = 0; r < rows; r += 2) {
    const S* row = x + r * stride;
    const Halves first = read_input<WIDE>(row, row + ahead, counts, columns, window, most[r]);
    Halves second{};
    if (r + 1 < rows) second = read_input<WIDE>(row + stride, row + stride + ahead, counts, columns, window, most[r + 1]);
    add_twos(counts, window, add_carry(ones, first, second));
  }
  for (int v = 0; v < INPUT; ++v) store_int(across + v * width<float>, columns[v]);
}

// At most MOST_ROWS rows.
template <bool WIDE, class S>
TORCHPROBE_INLINE void add_rows(const S* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  const int window = counts.usual;
  Halves ones = begin_window(counts.windows[window]);
  vint most[MOST_ROWS];
  for (int64_t r = 0; r < rows; ++r) most[r] = ~vint{};
  int64_t i = 0;
  for (; i + INPUT_VALUES <= n; i += INPUT_VALUES) add_columns<WIDE>(x + i, stride, rows, rows * stride, counts, across + i, window, ones, most);
  if (i < n) {
    S rest[MOST_ROWS * INPUT_VALUES] = {};
    int32_t rest_across[INPUT_VALUES] = {};
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(rest + r * INPUT_VALUES, x + r * stride + i, size_t(n - i) * sizeof(S));
    __builtin_memcpy(rest_across, across + i, size_t(n - i) * sizeof(int32_t));
    add_columns<WIDE>(rest, INPUT_VALUES, rows, 0, counts, rest_across, window, ones, most);
    __builtin_memcpy(across + i, rest_across, size_t(n - i) * sizeof(int32_t));
  }
  store_halves(counts.windows[window].ones, ones);
  for (int64_t r = 0; r < rows; ++r) {
    int32_t peak = largest_lane(most[r]);
    if (peak <= 0) {  // 0 is a value, or after the end of the row
      peak = -1;
      for (i = 0; i < n && peak < 0; ++i) peak = magnitude_bits<float>(widen(x[r * stride + i])) < FloatBits<float>::infinity ? 0 : -1;
    }
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
void add_fast(const S* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  if (!counts.first) place_windows(counts, most_exponents(x, n) + 2);
  for (int64_t r = 0; r < rows; r += MOST_ROWS) {
    const int64_t some = rows - r < MOST_ROWS ? rows - r : MOST_ROWS;
    counts.others = 0;
    if (counts.wide && counts.usual > 1) add_rows<true>(x + r * stride, stride, some, n, counts, across, largest + r);
    else add_rows<false>(x + r * stride, stride, some, n, counts, across, largest + r);
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

void add_float(const float* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_fast(x, stride, rows, n, counts, across, largest);
}
void add_bfloat16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_fast(static_cast<const BFloat16*>(x), stride, rows, n, counts, across, largest);
}
void add_float16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_fast(static_cast<const Float16*>(x), stride, rows, n, counts, across, largest);
}
void finish_counts(ExponentCounts& counts) {
  for (int window = 0; window < WINDOWS; ++window) empty_window(counts, window);
}

#else

void add_float(const float* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_plainly<float>(x, stride, rows, n, counts, across, largest);
}
void add_bfloat16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_plainly<float>(static_cast<const BFloat16*>(x), stride, rows, n, counts, across, largest);
}
void add_float16(const void* x, int64_t stride, int64_t rows, int64_t n, ExponentCounts& counts, int32_t* across, int32_t* largest) {
  add_plainly<float>(static_cast<const Float16*>(x), stride, rows, n, counts, across, largest);
}
void finish_counts(ExponentCounts&) {}

#endif

constexpr ExponentKernels exponent_kernels() { return {add_double, add_float, add_bfloat16, add_float16, finish_counts}; }
