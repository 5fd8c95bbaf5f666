// The kernels of overlap_tally_ for one instruction set; included between isa_begin.h and isa_end.h, inside a namespace.
//
// Most pixels need no interpolation. A weighted mean exceeds neither of its two values, not even after rounding (weights are at most
// 1 − 2^-21, see overlap.cpp). So a pixel can be active only between two rows, and between two columns, of which one exceeds the threshold.
// That leaves a few pixels in a hundred. They are interpolated and compared, 16 at a time, and the results become the bits of a mask. The
// intersection with a label is the number of bits in the conjunction of both masks.
//
// If two values are nearly as large as floats can be, their difference overflows, and an interpolated value may exceed both. Maps with such
// values, inf or nan are therefore interpolated everywhere.

constexpr int LANES = width<float>;
constexpr int VECTORS = GROUP / LANES;                    // in a group
typedef uint16_t __attribute__((may_alias)) GroupBits;    // a group inside the words of a mask
constexpr int64_t BLOCK_GROUPS = BLOCK * 64 / GROUP;

#if defined(TORCHPROBE_AVX512)
TORCHPROBE_INLINE uint32_t equal(vint a, vint b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
TORCHPROBE_INLINE vfloat pick(vfloat v, vint i) { return (vfloat)_mm512_permutexvar_ps((__m512i)i, (__m512)v); }
#elif defined(TORCHPROBE_AVX2)
TORCHPROBE_INLINE uint32_t equal(vint a, vint b) { return _mm256_movemask_ps((__m256)(a == b)); }
TORCHPROBE_INLINE vfloat pick(vfloat v, vint i) { return (vfloat)_mm256_permutevar8x32_ps((__m256)v, (__m256i)i); }
#else
TORCHPROBE_INLINE uint32_t equal(vint a, vint b) {
  const vint same = a == b;
  return (same[0] & 1) | (same[1] & 2) | (same[2] & 4) | (same[3] & 8);
}
#endif
TORCHPROBE_INLINE vint load_ints(const int32_t* p) {
  vint v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

int32_t paint(const int32_t* plane, const Grid& grid, int32_t row, const int32_t* slot, int64_t labels, uint64_t* masks) {
  for (; row < grid.rows; ++row) {
    for (int32_t g = 0; g < grid.groups; ++g) {
      const int32_t* p = plane + int64_t(row) * grid.columns + g * GROUP;
      int32_t part[GROUP] = {};
      uint32_t rest = (1u << GROUP) - 1;
      if (const int32_t n = grid.columns - g * GROUP; n < GROUP) {
        __builtin_memcpy(part, p, uint64_t(n) * sizeof *p);
        p = part;
        rest = (1u << n) - 1;
      }
      vint pixels[VECTORS];
      for (int v = 0; v < VECTORS; ++v) pixels[v] = load_ints(p + v * LANES);
      while (rest) {  // one round for each label in the group
        const int32_t label = p[__builtin_ctz(rest)];
        uint32_t bits = 0;
        for (int v = 0; v < VECTORS; ++v) bits |= equal(pixels[v], label - vint{}) << (v * LANES);
        rest &= ~bits;
        if (label == 0) continue;
        if (label < 0 || label >= labels || slot[label] < 0) return row;
        auto* mask = reinterpret_cast<GroupBits*>(masks + int64_t(slot[label]) * grid.blocks * BLOCK);
        mask[int64_t(row) * grid.groups + g] |= GroupBits(bits);
      }
    }
  }
  return row;
}

// The number of bits that two masks have in common, in n blocks.
TORCHPROBE_INLINE int64_t common(const uint64_t* a, const uint64_t* b, int64_t n) {
#if defined(TORCHPROBE_VPOPCNT)
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; ++i) {
    const __m512i both = _mm512_and_si512(_mm512_loadu_si512(a + i * BLOCK), _mm512_loadu_si512(b + i * BLOCK));
    sum = _mm512_add_epi64(sum, _mm512_popcnt_epi64(both));
  }
  return _mm512_reduce_add_epi64(sum);
#elif defined(TORCHPROBE_AVX512) || (defined(__x86_64__) && !defined(TORCHPROBE_AVX2))
  // Without an instruction that counts the bits of a vector: sums of neighboring bits, pairs, fours, and bytes (Hacker's Delight, 5-1).
  typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
  constexpr int STEP = VECTOR_BYTES / 8;
  const uint64_t ones = ~uint64_t(0) / 3, twos = ~uint64_t(0) / 5, fours = ~uint64_t(0) / 17, bytes = ~uint64_t(0) / 257;
  Words sum{};
  for (int64_t i = 0; i < n; ++i) {
    Words of_block{};  // at most 32 in a byte
    for (int j = 0; j < BLOCK; j += STEP) {
      Words x, y;
      __builtin_memcpy(&x, a + i * BLOCK + j, sizeof x);
      __builtin_memcpy(&y, b + i * BLOCK + j, sizeof y);
      x &= y;
      x -= (x >> 1) & ones;
      x = (x & twos) + ((x >> 2) & twos);
      of_block += (x + (x >> 4)) & fours;
    }
    of_block = (of_block & bytes) + ((of_block >> 8) & bytes);
    of_block += of_block >> 32;
    sum += (of_block + (of_block >> 16)) & 0xffff;
  }
  return int64_t(reduce(sum));
#else
  int64_t sum = 0;
  for (int64_t i = 0; i < n * BLOCK; ++i) sum += __builtin_popcountll(a[i] & b[i]);
  return sum;
#endif
}
int64_t count(const uint64_t* bits, int64_t words) { return common(bits, bits, words / BLOCK); }

enum : int { BELOW = 0, ABOVE = 1, ANYTHING = 2 };

// Whether any of n values exceeds the threshold (ABOVE), or none (BELOW). ANYTHING: a value is nan, inf or so large that differences overflow.
TORCHPROBE_INLINE int look(const float* p, int64_t n, float threshold) {
  const vfloat t = splat<float>(threshold);
  vint large{}, above{};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vfloat v = load<float>(p + i);
    above |= v > t;
    large |= ((vint)v & 0x7fffffff) > 0x7e7fffff;  // at least 2^126
  }
  if (i < n) {
    const vfloat v = load_part(p + i, n - i, p[0]);
    above |= v > t;
    large |= ((vint)v & 0x7fffffff) > 0x7e7fffff;
  }
  return any(large) ? ANYTHING : any(above) ? ABOVE : BELOW;
}

// Interpolates one row of the map at the columns of the grid.
TORCHPROBE_INLINE void stretch(const float* row, const Grid& grid, float* padded, float* to) {
  const int64_t columns = row_floats(grid);
#if defined(TORCHPROBE_AVX512) || defined(TORCHPROBE_AVX2)
  if (grid.window) {
    for (int32_t i = 0; i < grid.w; i += LANES) {
      store<float>(padded + i, grid.w - i < LANES ? load_part(row + i, grid.w - i, 0.0f) : load<float>(row + i));
    }
    for (int64_t x = 0; x < columns; x += LANES) {
      const vfloat values = load<float>(padded + grid.window[x / LANES]);
      const vfloat low = pick(values, load_ints(grid.window_low + x)), high = pick(values, load_ints(grid.window_high + x));
      const vfloat step = load<float>(grid.x_weight + x) * (high - low);
      store<float>(to + x, low + step);
    }
    return;
  }
#endif
  (void)padded;
  for (int64_t x = 0; x < columns; ++x) {
    const float low = row[grid.x_low[x]], step = grid.x_weight[x] * (row[grid.x_high[x]] - low);
    to[x] = low + step;
  }
}

// The mask in the rows of one gap, from the map's two rows around it. These rows of the mask must be 0 before.
TORCHPROBE_INLINE void fill(const float* low, const float* high, const Grid& grid, const Gap& gap, float threshold, bool everywhere,
                           GroupBits* mask) {
  const vfloat t = splat<float>(threshold);
  for (int32_t g = 0; g < grid.groups; ++g) {
    vfloat a[VECTORS], d[VECTORS];
    uint32_t hot = everywhere;
    for (int v = 0; v < VECTORS; ++v) {
      a[v] = load<float>(low + g * GROUP + v * LANES);
      const vfloat b = load<float>(high + g * GROUP + v * LANES);
      d[v] = b - a[v];
      hot |= gt(a[v], t) | gt(b, t);
    }
    if (!hot) continue;
    for (int32_t row = gap.first; row < gap.last; ++row) {
      const vfloat weight = splat<float>(grid.y_weight[row]);
      uint32_t bits = 0;
      for (int v = 0; v < VECTORS; ++v) {
        const vfloat step = weight * d[v];
        bits |= gt(a[v] + step, t) << (v * LANES);
      }
      mask[int64_t(row) * grid.groups + g] = GroupBits(bits);
    }
  }
}

// The mask of one unit; `found` is the result of look, and not BELOW. Returns the range of blocks with active pixels; other blocks are undefined.
struct Range {
  int32_t first, last;
};
TORCHPROBE_INLINE Range draw(const float* map, const Grid& grid, float threshold, int found, float* scratch, uint64_t* mask) {
  const bool everywhere = found == ANYTHING;
  float *rows[2] = {scratch, scratch + row_floats(grid)}, *padded = scratch + 2 * row_floats(grid);
  int32_t held[2] = {-1, -1};  // the row of the map that each of them contains
  int32_t first = -1, last = 0, known = -1;
  bool above = false;  // whether row `known` of the map exceeds the threshold; most rows are needed twice in succession
  auto* groups = reinterpret_cast<GroupBits*>(mask);
  int64_t cleared = 0;  // groups before this one are valid
  for (int32_t i = 0; i < grid.gap_count; ++i) {
    const Gap& gap = grid.gaps[i];
    bool hot = everywhere;
    for (const int32_t row : {gap.low, gap.high}) {
      if (row != known) known = row, above = look(map + int64_t(row) * grid.w, grid.w, threshold) != BELOW;
      hot |= above;
    }
    if (!hot) continue;
    for (const int32_t row : {gap.low, gap.high}) {
      if (held[row & 1] != row) stretch(map + int64_t(row) * grid.w, grid, padded, rows[row & 1]), held[row & 1] = row;
    }
    const int64_t begin = int64_t(gap.first) * grid.groups, end = int64_t(gap.last) * grid.groups;
    if (first < 0) first = int32_t(begin / BLOCK_GROUPS), cleared = first * BLOCK_GROUPS;
    last = int32_t((end + BLOCK_GROUPS - 1) / BLOCK_GROUPS);
    __builtin_memset(groups + cleared, 0, uint64_t(last * BLOCK_GROUPS - cleared) * sizeof *groups);
    cleared = end;
    fill(rows[gap.low & 1], rows[gap.high & 1], grid, gap, threshold, everywhere, groups);
  }
  return first < 0 ? Range{0, 0} : Range{first, last};
}

void tally(const Image& image, const Tally& to, int64_t begin, int64_t end, float* scratch, uint64_t* mask) {
  const Grid& grid = *image.grid;
  const int64_t size = int64_t(grid.h) * grid.w;
  for (int64_t unit = begin; unit < end; ++unit) {
    const float* map = image.maps + unit * size;
    const float threshold = to.thresholds[unit];
    const int found = look(map, size, threshold);
    if (found == BELOW) continue;
    const Range drawn = draw(map, grid, threshold, found, scratch, mask);
    const int64_t active = common(mask + drawn.first * BLOCK, mask + drawn.first * BLOCK, drawn.last - drawn.first);
    if (active == 0) continue;
    int64_t* activation = to.activation + unit * to.columns;
    for (int64_t i = 0; i < image.category_count; ++i) add(activation[image.categories[i]], active);
    int64_t* intersection = to.intersection + unit * to.labels;
    for (int64_t i = 0; i < image.label_count; ++i) {
      const LabelMask& label = image.labels[i];
      int64_t both = active;
      if (label.bits) {
        const int32_t first = drawn.first > label.first ? drawn.first : label.first, last = drawn.last < label.last ? drawn.last : label.last;
        both = first < last ? common(mask + first * BLOCK, label.bits + first * BLOCK, last - first) : 0;
      }
      add(intersection[label.label], both);
    }
  }
}
