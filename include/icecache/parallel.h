// Threads that the host program lends to the engine.
//
// A program that computes with a pool of threads between two engine calls had better lend that pool
// than let the engine keep a second one: OpenMP's threads go on spinning after each loop, on the
// very cores that the engine's would need.
#pragma once

#include <cstdint>

namespace icecache {

// Calls body(i, context) once for each i in [0, count), at the same time as far as it can, and
// returns when all have returned. It may run several of them one after the other.
using ParallelFor = void (*)(std::int64_t count, void (*body)(std::int64_t i, void* context),
                             void* context);

// What runs the parallel parts of engine calls from now on; null: the engine's own threads, which
// it starts with. Config::num_threads bounds `count`. Background work stays on own threads.
// Threads: from any thread.
void use_parallel_for(ParallelFor parallel_for);

}  // namespace icecache
