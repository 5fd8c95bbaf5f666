// Finds races and misaligned accesses in what the shim runs, as the compiler reports every load and store (-fsanitize=thread,alignment; the
// runtime behind it is races.cpp). Two threads race when one writes what the other reads or writes, no barrier between them, and not both
// atomically: what threads of a warp exchange by shuffles orders nothing in memory, __syncwarp orders what the warp does. Blocks of one launch
// race unless the first has a fence and then an atomic operation behind its access, and the second an atomic operation at the same address
// before.
#pragma once

#include <cstddef>
#include <string>

namespace shim::races {

// What is on trial: memory that all threads share, or those of a block.
void watch(const void* memory, size_t bytes, bool of_block = false);
void clear();

// The steps of a run. Accesses count between begin_block and end_block.
void begin_launch();
void begin_block();
void end_block();
void barrier();
void warp_barrier(int warp);
void fence();
void set_thread(int thread);

void access(const void* memory, size_t bytes, bool write, bool atomic = false);

// What was found first, or nothing.
const std::string& found();

}  // namespace shim::races
