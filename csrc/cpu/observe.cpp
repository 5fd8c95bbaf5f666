// torchprobe::observe_ on the CPU: tiles, threads, and the merge into the state. torchprobe/ops/observe.py defines the schema and explains it:
//
//   observe_(Tensor(a!) state, Tensor x, int feature_dim=-1, float outlier_sigma=6.0, int every=1, Tensor? mask=None) -> ()

#include "observe.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "arguments.h"
#include "isa.h"
#include "locks.h"
#include "parallel.h"

namespace torchprobe::cpu {
namespace {

using torch::stable::Tensor;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t parts(int64_t n, int64_t most) { return (n + most - 1) / most; }

constexpr int64_t BLOCK = 1536;                       // features of a block of rows
constexpr int64_t STRIP = int64_t(96) << 10;          // bytes of a strip in the second-level cache, next to as many that are prefetched
constexpr int64_t LONE_STRIP = int64_t(256) << 10;    // the same if there is only one block
constexpr int64_t SIDE_BY_SIDE = int64_t(512) << 10;  // bytes of a tile within a block, if vectors are side by side
constexpr int64_t SMALL = int64_t(3) << 17;           // elements of a call that one thread should do alone
constexpr int64_t CHUNK = 1024;                       // vectors, at least, that have a partial state if there are several blocks
constexpr int64_t PARTIALS = int64_t(8) << 20;        // numbers in all partial states
constexpr int64_t KEPT = int64_t(8) << 20;            // bytes of workspace that a thread keeps

// Memory that a thread keeps from call to call, unless it is large.
class Workspace {
 public:
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      data_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      STD_TORCH_CHECK(data_, "torchprobe: out of memory for a workspace of ", bytes, " bytes");
      size_ = bytes;
    }
    return data_.get();
  }
  void trim() {
    if (size_ > size_t(KEPT)) data_.reset(), size_ = 0;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t size_ = 0;
};

// What is read two or three times, a strip of a tile within a block, stays in the second-level cache meanwhile.
Call plan(const torchprobe::Call& described) {
  Call call{described};
  call.element = call.dtype == Dtype::Float64 ? 8 : 4;
  call.inverse_features = 1.0 / double(call.features);
  const int64_t row = call.dims ? call.size[call.dims - 1] : 1;
  const bool contiguous = call.feature_stride == 1 || call.features == 1;
  const bool neighbors = !contiguous && call.dims && call.stride[call.dims - 1] == 1;  // vectors are next to each other
  call.side_by_side = neighbors && !call.mask && row >= 16;
  int64_t block = BLOCK;
  if (call.side_by_side) {
    const int64_t equal = parts(row, parts(row, MAX_VECTORS));
    call.tile_vectors = std::min<int64_t>(round_up(equal, 32), MAX_VECTORS);
    call.tiles = call.vectors / row * parts(row, call.tile_vectors);
    block = std::max<int64_t>(SIDE_BY_SIDE / (call.tile_vectors * call.element), 32);
  } else {
    call.tile_vectors = neighbors ? STRIP_ROWS : MAX_ROWS;
    call.tiles = parts(call.vectors, call.tile_vectors);
  }
  const int64_t blocks = parts(call.features, block);
  call.block = round_up(parts(call.features, blocks < 3 ? blocks : round_up(blocks, 4)), 32);  // equal work for two or four threads
  call.blocks = parts(call.features, call.block);
  // Rows that are transposed copies are one strip, so that neighboring ones stay next to each other.
  const int64_t fit = (call.blocks > 1 ? STRIP : LONE_STRIP) / (call.block * call.element);
  call.strip = neighbors || fit >= STRIP_ROWS ? STRIP_ROWS : fit >= STRIP_ROWS / 2 ? STRIP_ROWS / 2 : STRIP_ROWS / 4;

  // Threads share what there is more of: blocks, or chunks of vectors. A chunk would need a partial state of its own.
  const int64_t elements = call.vectors * call.features;
  call.by_blocks = call.blocks > 1 && elements > SMALL && call.vectors / CHUNK < call.blocks;

  const int64_t whole = round_up(call.features, MAX_LANES) + MAX_LANES;
  const bool in_place = call.side_by_side || (contiguous && (call.dtype == Dtype::Float64 || call.dtype == Dtype::Float32));
  auto& at = call.scratch;
  at.vector = 0;
  at.lone_sums = at.vector + whole;
  at.features = at.lone_sums + call.blocks * SUMS * MAX_LANES;
  at.packed = at.features + (call.side_by_side || call.strip == call.tile_vectors ? 0 : call.block * FEATURE_SUMS);
  at.scales = at.packed + (in_place ? 0 : call.strip * (call.block + MAX_LANES));
  at.sums = at.scales + (call.by_blocks ? 0 : whole);
  at.end = at.sums + (call.by_blocks ? 0 : call.blocks * SUMS * round_up(call.tile_vectors, MAX_LANES));
  return call;
}

// f(begin, end, thread) for all of [0, n), which is divided at multiples of `step`. There are not more threads than PyTorch's.
template <class F>
void share(int64_t n, int64_t step, int64_t threads, const F& f) {
  parallel(0, threads, 1, [&](int64_t first, int64_t last) {
    const int64_t steps = parts(n, step), begin = first * steps / threads * step, end = std::min(last * steps / threads * step, n);
    if (begin < end) f(begin, end, first);
  });
}

// The tiles are divided into chunks. Each chunk has a partial state, and these are merged in order: the result is the same for any number of
// threads.
void observe_tiles(const Call& call, const ObserveKernels& kernels, double* to, std::unique_lock<std::mutex>& hold) {
  static thread_local Workspace partial_memory, scratch_memory;
  const int64_t features = call.features, slots = layout::size(features), bytes = call.scratch.end * call.element;
  const int64_t strips = call.side_by_side ? call.tiles : call.vectors / STRIP_ROWS;
  int64_t chunks = std::clamp<int64_t>(strips / 4, 1, std::clamp<int64_t>(strips / 16, 16, 64));
  if (call.blocks > 1) chunks = std::clamp<int64_t>(call.vectors / CHUNK, 1, 64);
  chunks = std::min(chunks, std::max<int64_t>(2, PARTIALS / slots));
  if (chunks == 1) {
    kernels.observe(call, 0, call.tiles, to, scratch_memory.reserve(size_t(bytes)));
  } else {
    hold.unlock();  // other calls may use the state while the partial states are computed
    double* partials = static_cast<double*>(partial_memory.reserve(size_t(chunks * slots) * sizeof(double)));
    parallel(0, chunks, 1, [&](int64_t begin, int64_t end) {
      void* scratch = scratch_memory.reserve(size_t(bytes));  // of this thread
      for (int64_t c = begin; c < end; ++c) {
        std::memset(partials + c * slots, 0, size_t(slots) * sizeof(double));
        kernels.observe(call, c * call.tiles / chunks, (c + 1) * call.tiles / chunks, partials + c * slots, scratch);
      }
      scratch_memory.trim();
    });
    hold.lock();
    parallel(0, features, std::max<int64_t>(4096 / chunks, 64), [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < chunks; ++c) kernels.merge(to, partials + c * slots, features, begin, end, begin == 0);
    });
  }
  scratch_memory.trim();
  partial_memory.trim();
}

// The blocks are divided among threads, which merge their features into the state itself: partial states of many features would take longer than
// the elements. Vectors wait until all blocks of a band of tiles have been seen. What is computed for a block is the same for any number of threads.
void observe_blocks(const Call& call, const ObserveKernels& kernels, double* to) {
  static thread_local Workspace memory;
  const int64_t sums = call.blocks * SUMS * call.element;  // bytes for each vector
  const int64_t tiles = std::clamp<int64_t>(KEPT / (call.tile_vectors * sums), 1, std::min<int64_t>(call.tiles, 64));
  const int64_t room = round_up(tiles * call.tile_vectors, MAX_LANES) + MAX_LANES, whole = round_up(call.features, MAX_LANES);
  const int64_t elements = call.vectors * call.features;
  const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), call.blocks, elements / (SMALL / 2)});
  const int64_t finishing = elements > 8 * SMALL ? threads : 1;  // usually little work, unless vectors are irregular or have many outliers
  const int64_t scratch_bytes = round_up(call.scratch.end * call.element, 64);

  // All memory is there before the state changes.
  char* free = static_cast<char*>(memory.reserve(size_t(room * (sums + 5 * 8) + (tiles + 8) * 8 + whole * call.element + threads * scratch_bytes)));
  auto take = [&](int64_t bytes) { return std::exchange(free, free + round_up(bytes, 64)); };
  char* scratch = take(threads * scratch_bytes);
  Band band(reinterpret_cast<double*>(take(4 * room * 8)), room);
  band.offset = reinterpret_cast<int64_t*>(take(room * 8));
  band.tile = reinterpret_cast<int64_t*>(take((tiles + 1) * 8));
  band.sums = take(room * sums);
  band.scales = take(whole * call.element);
  const int64_t row = call.side_by_side ? call.size[call.dims - 1] : 0;
  Cursor cursor(call, 0, call.dims);
  for (int64_t vector = 0; vector < call.vectors;) {
    band.vectors = band.tiles = 0;
    for (; vector < call.vectors; ++vector, cursor.next()) {
      if (call.mask && !call.mask[vector]) continue;
      const bool begins = row ? vector % row % call.tile_vectors == 0 : band.vectors % call.tile_vectors == 0;
      if (begins && band.tiles == tiles) break;
      if (begins) band.tile[band.tiles++] = band.vectors;
      band.offset[band.vectors++] = cursor.offset;
    }
    band.tile[band.tiles] = band.vectors;
    for (int64_t t = 0; t < band.tiles && !call.side_by_side; ++t) spread(call, band.offset + band.tile[t], int(band.tile[t + 1] - band.tile[t]));
    if (band.vectors == 0) break;
    if (band.first) band.scale = kernels.first_scale(call, band.offset[0]);
    share(call.blocks, 1, threads, [&](int64_t begin, int64_t end, int64_t thread) {
      kernels.sum_band(call, band, begin, end, to, scratch + thread * scratch_bytes);
    });
    double scale = band.scale;
    share(band.vectors, MAX_LANES, finishing, [&](int64_t begin, int64_t end, int64_t thread) {
      const double suitable = kernels.finish_band(call, band, begin, end, scratch + thread * scratch_bytes);
      if (end == band.vectors) scale = suitable;
    });
    share(call.blocks, 1, finishing, [&](int64_t begin, int64_t end, int64_t) { kernels.count_band(call, band, begin, end, to); });
    kernels.record(band.outcome, band.vectors, to);
    band.scale = scale;
    band.first = false;
  }
  memory.trim();
}

void observe_(Tensor state, Tensor x, int64_t feature_dim, double outlier_sigma, int64_t every, std::optional<Tensor> mask) {
  const Call call = plan(describe(state, x, feature_dim, outlier_sigma, every, mask));
  const ObserveKernels& kernels = choose<ObserveKernels>();
  const EveryNumber exact;
  double* to = static_cast<double*>(state.mutable_data_ptr());
  std::unique_lock<std::mutex> hold(lock_of(to));
  STD_TORCH_CHECK(to[layout::CALLS] >= 0 && to[layout::CALLS] < double(MOST_CALLS), "the state is damaged: it has counted ", to[layout::CALLS],
                  " calls");
  const double calls = to[layout::CALLS]++;
  if (std::fmod(calls, double(every)) != 0 || call.vectors == 0) return;
  if (call.by_blocks)
    observe_blocks(call, kernels, to);
  else
    observe_tiles(call, kernels, to, hold);
}

}  // namespace
}  // namespace torchprobe::cpu

STABLE_TORCH_LIBRARY_IMPL(torchprobe, CPU, m) { m.impl("observe_", TORCH_BOX(&torchprobe::cpu::observe_)); }
