// Threads may share a state: one call after the other changes or reads it.
#pragma once

#include <cstdint>
#include <mutex>

namespace torchprobe::cpu {

constexpr int LOCKS = 64;

// Several states may have the same lock: then one call waits for another. Whoever holds a lock waits for no other, and for nothing in Python.
inline std::mutex& lock_number(uintptr_t number) {
  static std::mutex* const locks = new std::mutex[LOCKS];  // other threads may still call while the process ends
  return locks[number % LOCKS];
}
inline std::mutex& lock_of(const void* state) { return lock_number(reinterpret_cast<uintptr_t>(state) >> 6); }

}  // namespace torchprobe::cpu
