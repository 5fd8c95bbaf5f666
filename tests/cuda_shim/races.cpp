#include "races.h"

#include <cstdint>
#include <map>
#include <set>
#include <vector>

namespace shim::races {
namespace {

constexpr size_t GRAIN = 2;  // bytes; no element is smaller
constexpr int NOBODY = -1, MANY = -2;

constexpr int WARP = 32, MOST_WARPS = 32;

// The last access of a kind. Intervals between barriers are counted over all blocks, one after the other; those between the barriers of a warp,
// for each warp.
struct Last {
  int thread = NOBODY, warp = MANY;  // MANY: of several
  int64_t block = 0, interval = 0, warp_interval = 0;
};
struct Grain {
  Last read, write;
  bool atomic = false;  // the write
};
struct Range {
  uintptr_t begin, end;
  bool of_block;  // each block has its own
  std::vector<Grain> grains;
};

std::vector<Range> ranges;
std::string first;
bool running = false;
int thread = 0;
int64_t block = 0, interval = 0, oldest = 0;  // blocks before `oldest` belong to earlier launches
int64_t warp_intervals[MOST_WARPS];
bool fenced = false;                               // the block has a fence behind what it wrote
std::map<uintptr_t, std::set<int64_t>> published;  // by an atomic operation behind a fence, at this address, by these blocks
std::set<int64_t> known;                           // blocks whose writes the block knows of, by an atomic operation at the same address

bool conflicts(const Range& range, const Last& last) {
  if (last.thread == NOBODY || last.block < oldest) return false;
  if (last.block != block) return !range.of_block && !known.count(last.block);
  if (last.interval != interval || last.thread == thread) return false;
  return last.warp != thread / WARP || last.warp_interval == warp_intervals[thread / WARP];
}

void report(const char* what, size_t range, uintptr_t offset, const Last& last) {
  if (!first.empty()) return;
  first = std::string("a race: ") + what + ", byte " + std::to_string(offset) + " of range " + std::to_string(range) + ", thread " +
          std::to_string(thread) + " and " + (last.thread == MANY ? "others" : std::to_string(last.thread)) +
          (last.block == block ? "" : " of another block");
}

}  // namespace

void watch(const void* memory, size_t bytes, bool of_block) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  ranges.push_back({begin, begin + bytes, of_block, std::vector<Grain>((bytes + GRAIN - 1) / GRAIN)});
}
void clear() { ranges.clear(), first.clear(), running = false; }
void begin_launch() { oldest = block + 1, published.clear(); }
void begin_block() { ++block, ++interval, running = true, fenced = false, known.clear(); }
void end_block() { running = false; }
void barrier() { ++interval; }
void warp_barrier(int warp) { ++warp_intervals[warp]; }
void fence() { fenced = true; }
void set_thread(int now) { thread = now; }
const std::string& found() { return first; }

void access(const void* memory, size_t bytes, bool write, bool atomic) {
  if (!running) return;
  const int warp = thread / WARP;
  const int64_t warp_interval = warp_intervals[warp];
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  for (size_t r = 0; r < ranges.size(); ++r) {
    if (at < ranges[r].begin || at >= ranges[r].end) continue;
    for (uintptr_t offset = at - ranges[r].begin; offset < at - ranges[r].begin + bytes; offset += GRAIN) {
      Grain& grain = ranges[r].grains[offset / GRAIN];
      if (conflicts(ranges[r], grain.write) && !(atomic && grain.atomic))
        report(write ? "two writes" : "a write and a read", r, offset, grain.write);
      if (write) {
        if (conflicts(ranges[r], grain.read)) report("a read and a write", r, offset, grain.read);
        grain.write = {thread, warp, block, interval, warp_interval}, grain.atomic = atomic;
      } else {
        const Last& last = grain.read;
        const bool recent = last.thread != NOBODY && last.block == block && last.interval == interval;
        const bool behind = last.warp == warp && last.warp_interval != warp_interval;  // a barrier of the warp came in between
        const bool others = recent && !behind && last.thread != thread;
        grain.read = {others ? MANY : thread, recent && last.warp != warp ? MANY : warp, block, interval, warp_interval};
      }
    }
    break;
  }
  if (atomic) {
    std::set<int64_t>& blocks = published[at];
    known.insert(blocks.begin(), blocks.end());
    if (fenced) blocks.insert(block);
  }
}

}  // namespace shim::races

// ---- what the compiler calls -------------------------------------------------------------------------------------------------------------

#define ACCESS(bytes)                                                                                        \
  void __tsan_read##bytes(void* at) { shim::races::access(at, bytes, false); }                               \
  void __tsan_write##bytes(void* at) { shim::races::access(at, bytes, true); }                               \
  void __tsan_unaligned_read##bytes(void* at) { shim::races::access(at, bytes, false); }                     \
  void __tsan_unaligned_write##bytes(void* at) { shim::races::access(at, bytes, true); }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* at, unsigned long bytes) { shim::races::access(at, bytes, false); }
void __tsan_write_range(void* at, unsigned long bytes) { shim::races::access(at, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }  // shared_ptr
void __ubsan_handle_type_mismatch_v1(void*, unsigned long at) {
  if (shim::races::running && shim::races::first.empty())
    shim::races::first = "an access that is not aligned, " + std::to_string(at % 16) + " bytes beyond a multiple of 16";
}
}
