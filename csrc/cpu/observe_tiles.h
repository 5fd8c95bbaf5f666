// The tiles of a call, one after the other. Part of observe_kernel.h.

// What one thread keeps from tile to tile, for features [begin, end).
template <class T>
struct Run {
  const Call& call;
  double* partial;
  const int64_t begin, end;
  T* memory;            // see Call::scratch
  T* scales;            // the last suitable scale of each feature
  T scale;              // the last suitable one of vectors
  bool uniform = true;  // every feature has seen `seen` values; until this ends, the row of counts is out of date
  double seen;

  Run(const Call& call, double* partial, int64_t begin, int64_t end, T* memory, T* scales, T scale)
      : call(call), partial(partial), begin(begin), end(end), memory(memory), scales(scales), scale(scale) {
    const double* count = rows_of(partial, call.features, 0).count;
    seen = count[begin];
    for (int64_t j = begin + 1; j < end && uniform; ++j) uniform = count[j] == seen;
  }
  ~Run() {
    if (uniform) count_apart(begin, 0);
  }

  void set_scales(T suitable) {
    scale = suitable;
    for (int64_t j = begin; j < end; ++j) scales[j] = suitable;
  }

  // From now on each feature has its own count. The features before `done` have already seen the tile of n vectors.
  void count_apart(int64_t done, int n) {
    double* count = rows_of(partial, call.features, 0).count;
    for (int64_t j = begin; j < end; ++j) count[j] = seen + (j < done ? n : 0);
    uniform = false;
  }
};

// The first guess of all scales, from one vector.
template <class S>
auto guess_scale(const Call& call, const S* x) {
  using T = decltype(widen(*x));
  const T largest = largest_deviation(x, call.features, call.feature_stride, T(widen(x[0])));
  if (!(largest > 0 && is_finite(largest)) || (largest >= T(0x1p-8) && largest <= T(0x1p8))) return T(1);
  return inverse_power<T>(largest);
}

// Merges features j … j + lanes of a tile of n vectors into the partial state, and first repeats those that are not valid. at(i, r) is feature i
// of vector r.
template <class T, int N, bool SideBySide, class At>
TORCHPROBE_INLINE void finish_features(Features<T, N>& f, bool suited, int64_t j, int lanes, int n, Run<T>& run, At at) {
  const Rows to = rows_of(run.partial, run.call.features, j);
  if (__builtin_expect(!suited || !run.uniform, 0)) {
    bool finite = true;
    for (int i = 0; i < lanes; ++i) {
      f.count[i] = T(n);
      const bool wrong = any(unsuited(splat(f.low[i]), splat(f.high[i]), splat(f.shift[i]), splat(f.scale[i]), splat(f.abs_sum[i])));
      const bool far = distant(f.s1[i], f.s2[i], f.s3[i], f.s4[i], T(n));
      if (!wrong && !far) continue;
      T x[MAX_VECTORS];
      for (int r = 0; r < n; ++r) x[r] = at(i, r);
      if (wrong)
        feature_again<T, N, SideBySide>(x, n, SideBySide ? n : int(run.call.strip), f, i, to.nonfinite[i]);
      else
        feature_nearer<T, N, SideBySide>(x, n, f, i);
      const T scale = f.scale[i] * f.unit[i];
      if (scale > 0 && is_finite(scale)) run.scales[j + i] = scale;
      finite &= f.count[i] == T(n);
    }
    if (!finite && run.uniform) run.count_apart(j, n);
  }
  if (run.uniform)
    merge_features<T, N>(f, lanes, n, run.seen, to);
  else
    merge_features_apart<T, N>(f, lanes, to);
}

// Merges the vectors of a tile into the partial state, after all blocks; at(r) is the first element of vector r.
template <class S, class T, bool SideBySide, class At>
TORCHPROBE_INLINE void finish_tile(int n, At at, Run<T>& run, const Sums<T>& sums, const Outcome& out) {
  const Call& call = run.call;
  finish_vectors<S, T, SideBySide>(call, sums, 0, n, at, run.scale, out, run.memory);
  count_outliers<S, T>(call, sums, 0, n, 0, call.blocks, at, out, rows_of(run.partial, call.features, 0).outliers);
  record(out, n, run.partial);
}

// Where the vectors of a tile and of the next one begin, in elements. If they are side by side, only the first one counts.
struct Tile {
  const int64_t* offset;
  int n;
  const int64_t* next_offset;
  int next_n;
};

// Copies n vectors whose features are not contiguous into rows, which are `row` elements apart. In the usual case, (N, C, H, W), neighboring
// positions are contiguous. Then blocks of W positions × W features are transposed in registers.
template <class S, class T>
void pack_rows(const S* x, const int64_t* offset, int n, int64_t features, int64_t stride, T* to, int64_t row) {
  constexpr int W = width<T>;
  for (int r = 0; r < n;) {
    int run = 1;
    while (r + run < n && run < W && offset[r + run] == offset[r] + run) ++run;
    int64_t j = 0;
    const S* from = x + offset[r];
    T* rows = to + r * row;
    if (run == W) {
      for (; j + W <= features; j += W) {
        Vec<T> block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = load_wide(from + (j + i) * stride);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) store(rows + i * row + j, block[i]);
      }
    }
    for (; j < features; ++j)
      for (int i = 0; i < run; ++i) rows[i * row + j] = widen(from[offset[r + i] - offset[r] + j * stride]);
    r += run;
  }
}

// ---- vectors as rows ---------------------------------------------------------------------------------------------------------------------

// The walk through the page tables for an address takes long, and a prefetch that waits for one holds up what follows. So all pages of the next
// strip are touched at once: then the walks overlap.
template <class S>
TORCHPROBE_INLINE void touch_pages(const S* const* ahead, int n, int64_t size) {
  for (int r = 0; r < n; ++r) {
    for (int64_t i = 0; i < size; i += 4096 / int64_t(sizeof(S))) prefetch(ahead[r] + i);
    prefetch(ahead[r] + size - 1);
  }
}

// The moments of the features of block b over rows [q, q + n) of a tile, a strip, whose vectors begin at x + tile.offset[r].
template <class S, class T, class Ahead>
TORCHPROBE_INLINE void strip_features(const S* x, const Tile& tile, int q, int n, int64_t b, T* const* row, const Ahead* const* ahead, Run<T>& run) {
  constexpr int W = width<T>, V = REGISTERS == 32 ? 2 : 1;
  const Call& call = run.call;
  const int64_t begin = call.block_begin(b), size = call.block_size(b);
  const bool first = q == 0, last = q + n == tile.n;
  T* kept = run.memory + call.scratch.features;  // from strip to strip
  auto take = [&](auto registers, T* const* row, int64_t at, int64_t j, int lanes) __attribute__((always_inline)) {
    constexpr int N = decltype(registers)::value * W;
    static_assert(sizeof(Features<T, N>) == N * FEATURE_SUMS * sizeof(T));
    Features<T, N> here, &f = first && last ? here : *reinterpret_cast<Features<T, N>*>(kept + j * FEATURE_SUMS);
    const bool suited = column_sums<Ahead, T, N / W>(row, n, at, run.scales + begin + j, f, ahead, first, last, tile.n);
    if (!last) return;
    finish_features<T, N, false>(f, suited, begin + j, lanes, tile.n, run,
                                 [&](int i, int r) { return widen(x[tile.offset[r] + (begin + j + i) * call.feature_stride]); });
  };
  int64_t j = 0;
  for (; j + V * W <= size; j += V * W) take(std::integral_constant<int, V>(), row, j, j, V * W);
  for (; j + W <= size; j += W) take(std::integral_constant<int, 1>(), row, j, j, W);
  if (j < size) {  // the last features do not fill a register: use a copy that does
    T rest[STRIP_ROWS][W];
    T* copy[STRIP_ROWS];
    for (int r = 0; r < n; ++r) {
      store(rest[r], load_part<T>(row[r] + j, size - j, 0));
      copy[r] = rest[r];
    }
    take(std::integral_constant<int, 1>(), copy, 0, j, int(size - j));
  }
}

// All sums of a strip: from[r], which is copied to row[r] if it is not of type T.
template <class S, class T, class From>
void observe_strip(const S* x, const Tile& tile, int q, int n, int64_t b, const From* const* from, T* const* row, const From* const* ahead,
                   Run<T>& run, const Vectors<T>& vectors) {
  if (run.call.features > 1)
    row_sums<From, T>(from, row, ahead, n, run.call.block_size(b), run.scale, vectors);
  else if constexpr (!std::is_same_v<From, T>)
    for (int r = 0; r < n; ++r) row_sum<From, T>(from[r], 1, 1, row[r]);  // only the copy
  strip_features(x, tile, q, n, b, row, ahead, run);
}

// The sums of a tile of rows over blocks [first_block, last_block): of its vectors, from number `at` on, and of its features.
template <class S, class T>
void sum_rows(const Tile& tile, int64_t first_block, int64_t last_block, Run<T>& run, const Sums<T>& sums, int64_t at) {
  const Call& call = run.call;
  const S* x = static_cast<const S*>(call.x);
  const bool contiguous = call.feature_stride == 1 || call.features == 1, dense = call.feature_stride <= 16;
  const int64_t row_of_packed = call.block + MAX_LANES;  // keeps rows out of the same cache sets
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = call.block_begin(b), size = call.block_size(b);
    for (int q = 0; q < tile.n; q += int(call.strip)) {
      const int n = tile.n - q < call.strip ? tile.n - q : int(call.strip);
      // What comes next: the next strip of this block, the first one of the next block, or that of the next tile.
      const bool here = q + n < tile.n || b + 1 < last_block;
      const int64_t* next = q + n < tile.n ? tile.offset + q + n : here ? tile.offset : tile.next_offset;
      const int64_t next_n = q + n < tile.n ? tile.n - q - n : here ? tile.n : tile.next_n;
      const int64_t next_begin = q + n < tile.n ? begin : call.block_begin(here ? b + 1 : first_block);
      const S *from[STRIP_ROWS], *ahead[STRIP_ROWS];
      T* row[STRIP_ROWS];
      for (int r = 0; r < n; ++r) {
        from[r] = x + tile.offset[q + r] + begin * call.feature_stride;
        ahead[r] = r < next_n ? x + next[r] + next_begin * call.feature_stride : from[r];
        row[r] = run.memory + call.scratch.packed + r * row_of_packed;
      }
      if (call.blocks > 1 && dense) touch_pages(ahead, n, size * call.feature_stride);
      if (contiguous) {
        if constexpr (std::is_same_v<S, T>)
          for (int r = 0; r < n; ++r) row[r] = const_cast<T*>(from[r]);  // used in place and never written
        observe_strip<S, T, S>(x, tile, q, n, b, from, row, ahead, run, sums.of(b, at + q));
      } else {
        pack_rows<S, T>(x + begin * call.feature_stride, tile.offset + q, n, size, call.feature_stride, row[0], row_of_packed);
        const T* fetch[STRIP_ROWS];  // only prefetched
        for (int r = 0; r < n; ++r) fetch[r] = dense ? reinterpret_cast<const T*>(ahead[r]) : row[r];
        observe_strip<S, T, T>(x, tile, q, n, b, row, row, fetch, run, sums.of(b, at + q));
      }
    }
  }
}

// Tiles [first_tile, last_tile) of rows, one after the other.
template <class S, class T>
void observe_rows(const Call& call, int64_t first_tile, int64_t last_tile, Run<T>& run, const Sums<T>& sums, const Outcome& out) {
  const S* x = static_cast<const S*>(call.x);
  int64_t vector = first_tile * call.tile_vectors, next_offset[MAX_ROWS];
  const int64_t end = last_tile * call.tile_vectors < call.vectors ? last_tile * call.tile_vectors : call.vectors;
  Cursor cursor(call, vector, call.dims);
  auto enumerate_next = [&] {  // those that are not masked out
    const int64_t tile_end = vector + call.tile_vectors < end ? vector + call.tile_vectors : end;
    int n = 0;
    for (; vector < tile_end; ++vector, cursor.next())
      if (!call.mask || call.mask[vector]) next_offset[n++] = cursor.offset;
    spread(call, next_offset, n);
    return n;
  };
  bool guessed = false;
  int next = enumerate_next();
  for (int64_t t = first_tile; t < last_tile; ++t) {
    int64_t offset[MAX_ROWS];
    const int n = next;
    __builtin_memcpy(offset, next_offset, n * sizeof *offset);
    next = t + 1 < last_tile ? enumerate_next() : 0;
    if (n == 0) continue;
    if (!guessed) run.set_scales(guess_scale(call, x + offset[0])), guessed = true;
    sum_rows<S, T>({offset, n, next_offset, next}, 0, call.blocks, run, sums, 0);
    run.seen += n;
    auto at = [&](int64_t r) { return x + offset[r]; };
    if (call.features > 1) {
      finish_tile<S, T, false>(n, at, run, sums, out);
    } else {  // no kurtosis: a vector with one feature is constant
      int finite = 0;
      for (int r = 0; r < n; ++r) finite += is_finite(widen(*at(r)));
      run.partial[layout::CONSTANT] += finite, run.partial[layout::INVALID] += n - finite;
    }
  }
}

// ---- vectors side by side ----------------------------------------------------------------------------------------------------------------

// As sum_rows. Every type is read in place.
template <class S, class T>
void sum_side_by_side(const Tile& tile, int64_t first_block, int64_t last_block, Run<T>& run, const Sums<T>& sums, int64_t at) {
  constexpr int N = PEAK_BLOCK, ROOM = MAX_VECTORS + MAX_LANES;
  const Call& call = run.call;
  T memory[SUMS * ROOM];
  FeatureLanes<T> in_lanes;
  const S* x = static_cast<const S*>(call.x);
  const int64_t stride = call.feature_stride;
  const int n = tile.n;
  for (int64_t b = first_block; b < last_block; ++b) {
    const int64_t begin = call.block_begin(b), size = call.block_size(b);
    const S *from = x + *tile.offset + begin * stride, *next = from;
    if (b + 1 < last_block)
      next = from + size * stride;
    else if (tile.next_n)
      next = x + *tile.next_offset + call.block_begin(first_block) * stride;
    const Vectors<T> v = sums.of(b, at), piece = size > PIECE ? Vectors<T>{memory, ROOM} : v;
    const bool zero = side_by_side_shifts<S, T>(from, stride, n, size, v);
    if (size > PIECE) clear(piece, n);
    const T scale = run.scale;
    for (int64_t j = 0; j < size; j += N) {
      // Means need all features of the block before the first power. Otherwise a few features are enough for the cache, and the next few are fetched.
      const S* ahead = zero ? (j + N < size ? from + (j + N) * stride : next) : next + j * stride;
      const int lanes = int(size - j < N ? size - j : N);
      if (!zero)
        side_by_side_powers<About::Mean, S, T>(from + j * stride, ahead, stride, n, lanes, scale, v, piece);
      else if (scale == 1)
        side_by_side_powers<About::ZeroUnscaled, S, T>(from + j * stride, ahead, stride, n, lanes, scale, v, piece);
      else
        side_by_side_powers<About::Zero, S, T>(from + j * stride, ahead, stride, n, lanes, scale, v, piece);
      if (size > PIECE && ((j + N) % PIECE == 0 || j + N >= size)) add_piece(v, piece, n);
      Features<T, N> f;
      bool suited = true;
      for (int i = 0; i < lanes; ++i) {
        const S* p = from + (j + i) * stride;
        const T shift = sample_shift<samples_of(true)>(n, [&](int r) { return T(widen(p[r])); });
        feature_sums<S, T, N>(p, ahead + i * stride, n, shift, run.scales[begin + j + i], f, i, in_lanes, i % width<T>);
        const int count = i % width<T> + 1;
        if (count == width<T> || i + 1 == lanes) flush(in_lanes, i + 1 - count, count, f);
      }
      for (int i = 0; i < lanes; i += width<T>) {
        auto part = [&](const T* p) { return load_part<T>(p + i, lanes - i < width<T> ? lanes - i : width<T>, 1); };
        suited &= !any(unsuited(part(f.low), part(f.high), part(f.shift), part(f.scale), part(f.abs_sum)) |
                       distant(part(f.s1), part(f.s2), part(f.s3), part(f.s4), T(n)));
      }
      finish_features<T, N, true>(f, suited, begin + j, lanes, n, run, [&](int i, int r) { return widen(from[(j + i) * stride + r]); });
    }
  }
}

// Tiles [first_tile, last_tile) of vectors side by side, one after the other.
template <class S, class T>
void observe_side_by_side(const Call& call, int64_t first_tile, int64_t last_tile, Run<T>& run, const Sums<T>& sums, const Outcome& out) {
  const S* x = static_cast<const S*>(call.x);
  const int64_t row = call.size[call.dims - 1], parts = (row + call.tile_vectors - 1) / call.tile_vectors;
  Cursor cursor(call, first_tile / parts, call.dims - 1);
  for (int64_t t = first_tile; t < last_tile; ++t) {
    const int64_t part = t % parts, start = part * call.tile_vectors, offset = cursor.offset + start;
    const int n = int(row - start < call.tile_vectors ? row - start : call.tile_vectors);
    if (part + 1 == parts) cursor.next();
    const int64_t next = part + 1 == parts ? cursor.offset : offset + n;
    if (t == first_tile) run.set_scales(guess_scale(call, x + offset));
    sum_side_by_side<S, T>({&offset, n, &next, t + 1 < last_tile}, 0, call.blocks, run, sums, 0);
    run.seen += n;
    finish_tile<S, T, true>(n, [&](int64_t r) { return x + offset + r; }, run, sums, out);
  }
}
