// Faults on demand: the N-th allocation of memory, of pages or of a thread fails, and no other.
//
// The executable replaces operator new, and puts itself between the engine and PagePool::allocate()
// and pthread_create(). Allocations are counted on all threads but those that are exempt.
#pragma once

#include <cstdint>

namespace icecache::fault {

enum class Kind { kMemory, kPages, kThreads };

// From now on counts allocations of one kind, and lets the nth fail (1: the next one; 0: none).
void arm(Kind kind, std::int64_t nth);
// Allocations since arm().
std::int64_t count();
// Whether the fault has happened.
bool fired();
// Where it happened; null: in none of these.
//  "insert": while tokens were added to an index
//  "build": while a segment was built behind decoding
//  "update": while the background indexed a prompt
const char* place();
// Blocks from operator new that were not deleted.
std::int64_t live_blocks();

// Allocations of this thread are counted only while one of these exists; other threads' always.
class Counted {
 public:
  Counted();
  ~Counted();
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
};
// The calling thread is exempt from now on.
void exempt_this_thread();

}  // namespace icecache::fault
