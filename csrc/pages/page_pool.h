// PagePool: fixed-size pages of host memory with reference counts, shared by all sequences.
//
// A page holds S tokens of one (sequence, layer, KV head): [2][S] rows, the K rows and then the V
// rows, contiguous, so that a page moves to a device in one copy. What a row is, its owner knows
// (simd/row_format.h, pages/head_context.h).
//
// Invariants
//  1. A page is free or has a reference count >= 1; free pages are on the free list exactly once.
//  2. Memory never exceeds `capacity_bytes`, but for a slab that take_ahead() makes while another
//  thread takes the last one, and gives back at once. Slabs are kept until destruction.
//  3. A page with reference count > 1 is never written (copy on write is the caller's duty:
//  unique()).
//  4. `epoch` strictly increases over all writes of the pool, so (id, epoch) names one content for
//  ever.
//
// Threads: every method may be called from any thread. The content of a page is guarded by its
// owner.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "icecache/types.h"

namespace icecache {

// Who a page belongs to and what it held when it was last sealed.
struct PageHeader {
  SeqId sequence = -1;  // the sequence that wrote it; forks share it
  std::int32_t layer = -1;
  std::int32_t head = -1;      // KV head
  std::uint64_t epoch = 0;     // of the last seal()
  std::uint64_t checksum = 0;  // of the page's bytes at the last seal(); 0 where integrity is off
  std::atomic<std::uint32_t> references{0};
};

struct PageOwner {
  SeqId sequence = -1;
  std::int32_t layer = -1;
  std::int32_t head = -1;
};

enum class Integrity : std::uint8_t { kOff, kSampled, kAlways };

class PagePool {
 public:
  struct Options {
    std::size_t page_bytes = 0;
    std::size_t capacity_bytes = 0;
    Integrity integrity = Integrity::kOff;
    bool poison_freed = false;  // fill freed pages with NaN bit patterns (0xff); always on in debug
    bool pinned = false;        // page-locked memory (needs a CUDA device)
  };

  // Throws InvalidArgument where not even one page fits.
  explicit PagePool(const Options& options);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // A page with reference count 1 and unspecified content. Throws OutOfPages naming capacity, pages
  // in use and page size.
  PageId allocate(const PageOwner& owner);
  // All or none: appends `count` pages to `out`, or throws OutOfPages and changes nothing.
  void allocate(std::size_t count, const PageOwner& owner, std::vector<PageId>& out);
  // Takes one more slab, unless `pages` are free by now or the capacity is reached: for a thread that
  // takes memory before it is needed, since page-locking some is slow. Nobody else waits for it.
  // False where it took none, also where the system has no memory: allocate() says so to whoever
  // needs it.
  bool take_ahead(std::size_t pages);
  void retain(PageId page);
  // Frees the page when the count reaches 0.
  void release(PageId page) noexcept;
  bool unique(PageId page) const;

  // Stable while the page is held; lock-free.
  std::byte* data(PageId page) const;
  const PageHeader& header(PageId page) const;

  // Ends a write: stamps a new epoch, and a checksum unless integrity is off. Returns the epoch.
  std::uint64_t seal(PageId page);
  // Throws IntegrityError naming page, sequence, layer, head and what differs, when the header does
  // not carry `epoch`, `layer`, `head`, or the bytes do not match. kOff: never; kSampled: the
  // header always, the bytes on every 64th call; kAlways: both.
  void verify(PageId page, std::uint64_t epoch, std::int32_t layer, std::int32_t head) const;

  std::size_t page_bytes() const { return options_.page_bytes; }
  std::size_t capacity_pages() const { return capacity_pages_; }
  std::size_t used_pages() const;
  std::size_t free_pages() const { return capacity_pages_ - used_pages(); }
  // Bytes taken from the operating system so far.
  std::size_t allocated_bytes() const;
  // Throws IntegrityError when an invariant does not hold; for tests.
  void check_integrity() const;

 private:
  struct Slab;
  Slab& slab_of(PageId page) const;
  // Pages of the slab that would come next; 0 where the capacity is reached.
  std::size_t next_slab_locked() const;
  std::unique_ptr<Slab> make_slab(std::size_t pages) const;
  void add_locked(std::unique_ptr<Slab> slab, std::size_t pages);

  Options options_;
  std::size_t capacity_pages_ = 0;
  std::size_t slab_pages_ = 0;
  std::vector<std::unique_ptr<Slab>> slabs_;  // sized once; entries appear in order
  mutable std::mutex mutex_;                  // guards free_list_, taken_pages_, slab creation
  std::vector<PageId> free_list_;
  std::size_t taken_pages_ = 0;  // pages of existing slabs
  std::atomic<std::size_t> used_pages_{0};
  std::atomic<std::uint64_t> next_epoch_{1};
  mutable std::atomic<std::uint64_t> verify_count_{0};
};

}  // namespace icecache
