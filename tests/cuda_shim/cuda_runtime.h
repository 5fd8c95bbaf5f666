// CUDA's execution model on the host: grids, blocks, warps, shared memory, barriers, shuffles, votes and asynchronous copies, as far as
// csrc/cuda needs them. A thread of the device is a fibre; blocks run one after the other. What the hardware leaves open is left open here,
// too: the order of blocks and, between two meeting points, of the threads of a block is a function of `order`. Where the hardware gives
// nothing away for free, neither is it here: shared memory starts out as garbage, an asynchronous copy happens when it is waited for, and a
// barrier or shuffle that not all threads reach is an error.
//
// This one header stands in for cuda_runtime.h, cuda_runtime_api.h, cuda_fp16.h, cuda_bf16.h and cuda_pipeline.h.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace shim {

constexpr int WARP = 32;
constexpr size_t SHARED_LIMIT = 256 << 10, STACK = 256 << 10;
constexpr unsigned char POISON = 0x41;  // a finite number in every format: what the kernels know how to mend would hide it

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Wait { Nothing, Barrier, Warp, End };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // the last of the bytes are not copied, but zero
};

struct Fibre {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  Wait wait = Wait::Nothing;
  const char* what = "";               // the kind of meeting point it waits at
  std::vector<std::vector<Copy>> copies;  // committed groups that were not waited for
  std::vector<Copy> open;
};

struct Machine {
  std::vector<Fibre> fibres;
  std::function<void()> body;
  jmp_buf scheduler;
  int current = -1, threads = 0;
  bool any = false, any_result = false;
  struct Lane {
    unsigned char value[2][16];
    int phase = 0;
  };
  std::vector<Lane> lanes;
  std::mt19937 random;
  unsigned order = 0;
  std::string error;

  std::vector<int> permutation(int n) {
    std::vector<int> p(n);
    for (int i = 0; i < n; ++i) p[i] = order == 1 ? n - 1 - i : i;
    if (order > 1) std::shuffle(p.begin(), p.end(), random);
    return p;
  }
  void run_block(unsigned block, size_t shared_bytes);
  void pause(Wait wait, const char* what) {
    Fibre& mine = fibres[current];
    mine.wait = wait, mine.what = what;
    if (_setjmp(mine.at) == 0) _longjmp(scheduler, 1);
  }
  [[noreturn]] static void enter();
  // All of these wait at one and the same kind of meeting point.
  bool meet(int begin, int end, Wait wait) {
    for (int t = begin; t < end; ++t) {
      if (fibres[t].wait != wait) return false;
      if (std::strcmp(fibres[t].what, fibres[begin].what)) throw Error(std::string(fibres[begin].what) + " meets " + fibres[t].what);
    }
    return true;
  }
};
inline Machine machine;

}  // namespace shim

inline dim3 threadIdx(0, 0, 0), blockIdx(0, 0, 0), blockDim, gridDim;

namespace torchprobe::cuda {
alignas(16) inline unsigned char shared_memory[shim::SHARED_LIMIT];  // what the kernels declare as extern __shared__
}

namespace shim {

inline void Machine::enter() {
  machine.body();
  machine.pause(Wait::End, "the end");
  std::abort();
}

inline void Machine::run_block(unsigned block, size_t shared_bytes) {
  unsigned char* const memory = torchprobe::cuda::shared_memory;
  std::memset(memory, POISON, SHARED_LIMIT);
  blockIdx = dim3(block, 0, 0);
  if (int(fibres.size()) < threads) fibres.resize(threads);
  lanes.assign(threads, {});
  for (int t = 0; t < threads; ++t) {
    fibres[t].started = false, fibres[t].wait = Wait::Nothing;
    fibres[t].copies.clear(), fibres[t].open.clear();
  }
  races::begin_block();
  for (;;) {
    bool ran = false;
    for (int t : permutation(threads)) {
      // A thread goes on until it has to meet others; a warp that has met goes on at once.
      while (fibres[t].wait == Wait::Nothing) {
        ran = true;
        current = t;
        races::set_thread(t);
        threadIdx = dim3(unsigned(t), 0, 0);
        if (_setjmp(scheduler) == 0) {
          if (fibres[t].started) _longjmp(fibres[t].at, 1);
          fibres[t].started = true;
          getcontext(&fibres[t].start);
          fibres[t].start.uc_stack.ss_sp = fibres[t].stack.get();
          fibres[t].start.uc_stack.ss_size = STACK;
          fibres[t].start.uc_link = nullptr;
          makecontext(&fibres[t].start, reinterpret_cast<void (*)()>(&Machine::enter), 0);
          setcontext(&fibres[t].start);
        }
        const int warp = t / WARP * WARP;
        if (fibres[t].wait == Wait::Warp && meet(warp, warp + WARP, Wait::Warp)) {
          if (!std::strcmp(fibres[t].what, "__syncwarp")) races::warp_barrier(warp / WARP);
          for (int u = warp; u < warp + WARP; ++u) fibres[u].wait = Wait::Nothing;
        }
      }
    }
    if (meet(0, threads, Wait::End)) break;
    if (meet(0, threads, Wait::Barrier)) {
      any_result = any, any = false;
      races::barrier();
      for (int t = 0; t < threads; ++t) fibres[t].wait = Wait::Nothing;
    } else if (!ran) {
      throw Error("some threads wait at " + std::string(fibres[0].what) + " for others that never come");
    }
  }
  races::end_block();
  for (size_t i = shared_bytes; i < SHARED_LIMIT; ++i)
    if (memory[i] != POISON) throw Error("a block wrote beyond its " + std::to_string(shared_bytes) + " bytes of shared memory");
}

// Every lane gives a value and gets another lane's.
template <class T>
T exchange(T value, int from, const char* what) {
  static_assert(sizeof(T) <= 16);
  const int t = machine.current, warp = t / WARP * WARP;
  Machine::Lane& mine = machine.lanes[t];
  const int phase = mine.phase;
  mine.phase ^= 1;
  std::memcpy(mine.value[phase], &value, sizeof value);
  machine.pause(Wait::Warp, what);
  std::memcpy(&value, machine.lanes[warp + from].value[phase], sizeof value);
  return value;
}

// One bit for each lane.
inline unsigned ballot(bool predicate, const char* what) {
  unsigned all = unsigned(predicate) << machine.current % WARP;
  for (int m = 1; m < WARP; m *= 2) all |= exchange(all, machine.current % WARP ^ m, what);
  return all;
}

inline void require_all(unsigned mask) {
  if (mask != 0xffffffffu) throw Error("the shim knows whole warps only");
}

}  // namespace shim

// ---- what kernels call -------------------------------------------------------------------------------------------------------------------

inline void __syncthreads() { shim::machine.pause(shim::Wait::Barrier, "__syncthreads"); }
inline int __syncthreads_or(int predicate) {
  shim::machine.any |= predicate != 0;
  shim::machine.pause(shim::Wait::Barrier, "__syncthreads_or");
  return shim::machine.any_result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  shim::require_all(mask);
  return shim::exchange(value, shim::machine.current % shim::WARP ^ lanes, "__shfl_xor_sync");
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  shim::require_all(mask);
  return shim::exchange(value, lane, "__shfl_sync");
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  shim::require_all(mask);
  return shim::ballot(predicate != 0, "__ballot_sync");
}
inline int __all_sync(unsigned mask, int predicate) {
  shim::require_all(mask);
  return shim::ballot(predicate != 0, "__all_sync") == 0xffffffffu;
}
inline int __any_sync(unsigned mask, int predicate) {
  shim::require_all(mask);
  return shim::ballot(predicate != 0, "__any_sync") != 0;
}
inline unsigned __match_any_sync(unsigned mask, unsigned long long value) {
  shim::require_all(mask);
  unsigned same = 0;
  for (int m = 0; m < shim::WARP; ++m) {
    const int lane = shim::machine.current % shim::WARP ^ m;
    if (shim::exchange(value, lane, "__match_any_sync") == value) same |= 1u << lane;
  }
  return same;
}
inline void __syncwarp() {
  shim::machine.pause(shim::Wait::Warp, "__syncwarp");
}
// What a thread wrote before a fence and an atomic operation after it, other blocks may read after an atomic operation of theirs.
inline void __threadfence() { shim::races::fence(); }
template <class T>
__attribute__((noinline, no_sanitize_thread)) T atomicAdd(T* to, T value) {
  shim::races::access(to, sizeof *to, true, true);
  const T before = *to;
  *to += value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) shim::machine.error = "an asynchronous copy is not aligned";
  shim::machine.fibres[shim::machine.current].open.push_back({to, from, bytes, zeros});
}
inline void __pipeline_commit() {
  shim::Fibre& mine = shim::machine.fibres[shim::machine.current];
  mine.copies.push_back(std::move(mine.open));
  mine.open.clear();
}
inline void __pipeline_wait_prior(size_t later) {
  auto& copies = shim::machine.fibres[shim::machine.current].copies;
  while (copies.size() > later) {
    for (const shim::Copy& copy : copies.front()) {
      const size_t copied = copy.bytes - copy.zeros;
      if (copied) shim::races::access(copy.from, copied, false);
      shim::races::access(copy.to, copy.bytes, true);
      std::memcpy(copy.to, copy.from, copied);
      std::memset(static_cast<char*>(copy.to) + copied, 0, copy.zeros);
    }
    copies.erase(copies.begin());
  }
}

template <class To, class From>
To shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t x) { return shim_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return shim_bits<uint32_t>(x); }
inline double __longlong_as_double(int64_t x) { return shim_bits<double>(x); }
inline int64_t __double_as_longlong(double x) { return shim_bits<int64_t>(x); }

struct float2 {
  float x, y;
};
struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  uint16_t x, y;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline float __half2float(__half h) {
  const uint32_t sign = uint32_t(h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, mantissa = h.bits & 1023u;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float small = std::ldexp(float(mantissa), -24);
  return sign ? -small : small;
}
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half __float2half_rn(float x) {
  uint16_t bits = uint16_t(__float_as_uint(x) >> 16 & 0x8000u);
  if (std::isnan(x)) return {uint16_t(bits | 0x7fffu)};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return {uint16_t(bits | 0x7c00u)};
  int exponent = std::max(std::ilogb(magnitude), -14);  // of the last place: exponent − 10
  return {uint16_t(bits | (uint16_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent))) + ((exponent + 14) << 10)))};
}

// A nan is passed over, as by fminf and fmaxf.
inline float shim_widen(__half x) { return __half2float(x); }
inline float shim_widen(uint16_t bfloat16) { return __uint_as_float(uint32_t(bfloat16) << 16); }
template <class H>
H shim_smaller(H a, H b) {
  const float x = shim_widen(a), y = shim_widen(b);
  return y < x || std::isnan(x) ? b : a;
}
template <class H>
H shim_larger(H a, H b) {
  const float x = shim_widen(a), y = shim_widen(b);
  return y > x || std::isnan(x) ? b : a;
}
inline __half2 __hmin2(__half2 a, __half2 b) { return {shim_smaller(a.x, b.x), shim_smaller(a.y, b.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {shim_larger(a.x, b.x), shim_larger(a.y, b.y)}; }
inline __nv_bfloat162 __hmin2(__nv_bfloat162 a, __nv_bfloat162 b) { return {shim_smaller(a.x, b.x), shim_smaller(a.y, b.y)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) { return {shim_larger(a.x, b.x), shim_larger(a.y, b.y)}; }

using std::fma;
using std::fmaxf;
using std::fminf;

// ---- what the host calls -----------------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {};
inline std::map<const void*, int> shim_most_shared;  // kernel → how much shared memory it may have: 48 KB unless more was asked for
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  shim_most_shared[kernel] = bytes;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

namespace torchprobe::cuda {
struct Plan;
}
namespace shim {
// Every kernel takes one Plan.
template <class Argument>
cudaError_t launch(void (*kernel)(const Argument), dim3 grid, dim3 block, const Argument& argument, size_t shared_bytes) {
  if (block.x % WARP || shared_bytes > SHARED_LIMIT) throw Error("a launch that the shim cannot do");
  const auto allowed = shim_most_shared.find(reinterpret_cast<const void*>(kernel));
  if (block.x > 1024 || shared_bytes > size_t(allowed == shim_most_shared.end() ? 48 << 10 : allowed->second))
    throw Error("a launch that a device would refuse: " + std::to_string(block.x) + " threads, " + std::to_string(shared_bytes) +
                " bytes of shared memory");
  races::begin_launch();
  gridDim = grid, blockDim = block;
  machine.threads = int(block.x);
  machine.body = [&] { kernel(argument); };
  machine.error.clear();
  for (int b : machine.permutation(int(grid.x))) machine.run_block(unsigned(b), shared_bytes);
  if (!machine.error.empty()) throw Error(machine.error);
  if (!races::found().empty()) throw Error(races::found());
  return cudaSuccess;
}
}  // namespace shim
