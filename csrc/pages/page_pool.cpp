#include "pages/page_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cuda/cuda_info.h"
#include "icecache/error.h"
#include "pages/checksum.h"

namespace icecache {
namespace {

constexpr std::size_t kSlabBytes = std::size_t{8} << 20;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kCacheLine = 64;
constexpr int kPoison = 0xff;  // a NaN in fp32, bf16 and fp16
constexpr std::uint64_t kSampleEvery = 64;

#ifdef NDEBUG
constexpr bool kDebug = false;
#else
constexpr bool kDebug = true;
#endif

std::byte* allocate_host(std::size_t bytes) {
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded));
  // Pages are read in random order; with small memory pages each read would also miss the TLB.
  if (memory != nullptr && bytes >= kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
  return memory;
}

}  // namespace

struct PagePool::Slab {
  Slab(std::size_t page_count, std::size_t bytes, bool pinned_memory)
      : pinned(pinned_memory), headers(page_count) {
    memory = pinned ? allocate_pinned(bytes) : allocate_host(bytes);
    if (memory == nullptr) throw std::bad_alloc();
  }
  ~Slab() { pinned ? free_pinned(memory) : std::free(memory); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  bool pinned;
  std::byte* memory = nullptr;
  std::vector<PageHeader> headers;
};

PagePool::PagePool(const Options& options) : options_(options) {
  if (options_.page_bytes == 0) throw InvalidArgument("page_bytes must be positive, got 0");
  if (options_.capacity_bytes < options_.page_bytes) {
    throw InvalidArgument(message("capacity_bytes must hold at least one page of ",
                                  options_.page_bytes, " bytes, got ", options_.capacity_bytes));
  }
  if (options_.pinned && cuda_info().devices == 0) {
    throw Unavailable(message("device=cuda needs page-locked memory: ", cuda_info().message));
  }
  if (kDebug) options_.poison_freed = true;
  capacity_pages_ = std::min<std::size_t>(options_.capacity_bytes / options_.page_bytes, kNoPage);
  // A power of two, so that an id splits into slab and offset by shift and mask.
  slab_pages_ = std::bit_floor(std::max<std::size_t>(1, kSlabBytes / options_.page_bytes));
  slabs_.resize((capacity_pages_ + slab_pages_ - 1) / slab_pages_);
}

PagePool::~PagePool() = default;

PagePool::Slab& PagePool::slab_of(PageId page) const {
  return *slabs_[page >> std::countr_zero(slab_pages_)];
}

std::size_t PagePool::next_slab_locked() const {
  return std::min(slab_pages_, capacity_pages_ - taken_pages_);
}

std::unique_ptr<PagePool::Slab> PagePool::make_slab(std::size_t count) const {
  const std::size_t bytes = count * options_.page_bytes;
  auto slab = std::make_unique<Slab>(count, bytes, options_.pinned);
  if (options_.poison_freed) std::memset(slab->memory, kPoison, bytes);
  return slab;
}

void PagePool::add_locked(std::unique_ptr<Slab> slab, std::size_t count) {
  // release() must not throw: the list has room for every page before one is handed out.
  free_list_.reserve(taken_pages_ + count);
  slabs_[taken_pages_ / slab_pages_] = std::move(slab);
  for (std::size_t i = count; i-- > 0;) {
    free_list_.push_back(static_cast<PageId>(taken_pages_ + i));
  }
  taken_pages_ += count;
}

bool PagePool::take_ahead(std::size_t pages) {
  const auto next = [&] {
    const std::lock_guard lock(mutex_);
    return free_list_.size() < pages ? next_slab_locked() : 0;
  };
  const std::size_t count = next();
  if (count == 0) return false;
  try {
    std::unique_ptr<Slab> slab = make_slab(count);
    const std::lock_guard lock(mutex_);
    if (next_slab_locked() != count) return false;  // another thread has reached the capacity
    add_locked(std::move(slab), count);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

PageId PagePool::allocate(const PageOwner& owner) {
  std::vector<PageId> page;
  allocate(1, owner, page);
  return page.front();
}

void PagePool::allocate(std::size_t count, const PageOwner& owner, std::vector<PageId>& out) {
  out.reserve(out.size() + count);
  std::lock_guard lock(mutex_);
  const std::size_t used = used_pages_.load(std::memory_order_relaxed);
  if (count > capacity_pages_ - used) {
    throw OutOfPages(message("the page pool has no room for ", count, " more pages: ", used, " of ",
                             capacity_pages_, " pages of ", options_.page_bytes,
                             " bytes are in use (capacity ", options_.capacity_bytes,
                             " bytes; set by host_memory)"));
  }
  try {
    while (free_list_.size() < count) {
      const std::size_t next = next_slab_locked();
      add_locked(make_slab(next), next);
    }
  } catch (const std::bad_alloc&) {
    throw OutOfPages(message("the operating system has no ", options_.pinned ? "page-locked " : "",
                             "memory for more pages: ", taken_pages_ * options_.page_bytes, " of ",
                             options_.capacity_bytes, " bytes are allocated, ", used, " pages of ",
                             options_.page_bytes, " bytes in use"));
  }
  for (std::size_t i = 0; i < count; ++i) {
    const PageId page = free_list_.back();
    free_list_.pop_back();
    PageHeader& header = slab_of(page).headers[page & (slab_pages_ - 1)];
    header.sequence = owner.sequence;
    header.layer = owner.layer;
    header.head = owner.head;
    header.epoch = 0;
    header.checksum = 0;
    header.references.store(1, std::memory_order_relaxed);
    out.push_back(page);
  }
  used_pages_.store(used + count, std::memory_order_relaxed);
}

void PagePool::retain(PageId page) {
  auto& references = slab_of(page).headers[page & (slab_pages_ - 1)].references;
  [[maybe_unused]] const auto before = references.fetch_add(1, std::memory_order_relaxed);
  assert(before > 0 && "retain of a free page");
}

void PagePool::release(PageId page) noexcept {
  PageHeader& header = slab_of(page).headers[page & (slab_pages_ - 1)];
  const auto before = header.references.fetch_sub(1, std::memory_order_acq_rel);
  assert(before > 0 && "release of a free page");
  if (before != 1) return;
  // No content has epoch 0: whoever still names the old one is told by verify().
  header.epoch = 0;
  if (options_.poison_freed) std::memset(data(page), kPoison, options_.page_bytes);
  std::lock_guard lock(mutex_);
  free_list_.push_back(page);
  used_pages_.fetch_sub(1, std::memory_order_relaxed);
}

bool PagePool::unique(PageId page) const {
  return header(page).references.load(std::memory_order_acquire) == 1;
}

std::byte* PagePool::data(PageId page) const {
  return slab_of(page).memory + (page & (slab_pages_ - 1)) * options_.page_bytes;
}

const PageHeader& PagePool::header(PageId page) const {
  return slab_of(page).headers[page & (slab_pages_ - 1)];
}

std::uint64_t PagePool::seal(PageId page) {
  PageHeader& header = slab_of(page).headers[page & (slab_pages_ - 1)];
  assert(header.references.load(std::memory_order_relaxed) == 1 && "write to a shared page");
  header.epoch = next_epoch_.fetch_add(1, std::memory_order_relaxed);
  header.checksum =
      options_.integrity == Integrity::kOff ? 0 : checksum(data(page), options_.page_bytes);
  return header.epoch;
}

void PagePool::verify(PageId page, std::uint64_t epoch, std::int32_t layer,
                      std::int32_t head) const {
  if (options_.integrity == Integrity::kOff) return;
  if (page >= capacity_pages_ || slabs_[page >> std::countr_zero(slab_pages_)] == nullptr) {
    throw IntegrityError(message("page ", page, " does not exist (pool of ", capacity_pages_,
                                 " pages; asked for layer ", layer, ", head ", head, ")"));
  }
  const PageHeader& header = this->header(page);
  const auto refuse = [&](const auto&... what) {
    throw IntegrityError(message("page ", page, " (sequence ", header.sequence, ", layer ",
                                 header.layer, ", head ", header.head, "): ", what...));
  };
  if (header.references.load(std::memory_order_acquire) == 0) {
    refuse("the page is free; epoch ", epoch, " was expected");
  }
  if (header.epoch != epoch) {
    refuse("the page was written again: epoch ", epoch, " was expected, the header has ",
           header.epoch);
  }
  if (header.layer != layer) refuse("layer ", layer, " was expected");
  if (header.head != head) refuse("head ", head, " was expected");

  const bool sampled = verify_count_.fetch_add(1, std::memory_order_relaxed) % kSampleEvery == 0;
  if (options_.integrity == Integrity::kSampled && !sampled) return;
  const std::uint64_t sum = checksum(data(page), options_.page_bytes);
  if (sum != header.checksum) {
    refuse("the bytes were altered after they were sealed: checksum ", header.checksum,
           " was expected, the bytes have ", sum);
  }
}

std::size_t PagePool::used_pages() const {
  return used_pages_.load(std::memory_order_relaxed);
}

std::size_t PagePool::allocated_bytes() const {
  std::lock_guard lock(mutex_);
  return taken_pages_ * options_.page_bytes;
}

// A release() of another thread that has dropped the last reference but is not yet on the free list
// would be reported: callers let the pool come to rest first.
void PagePool::check_integrity() const {
  std::lock_guard lock(mutex_);
  const auto require = [](bool holds, const auto&... what) {
    if (!holds) throw IntegrityError(message("page pool: ", what...));
  };
  require(taken_pages_ * options_.page_bytes <= options_.capacity_bytes, taken_pages_, " pages of ",
          options_.page_bytes, " bytes exceed the capacity of ", options_.capacity_bytes);
  std::vector<bool> free(taken_pages_, false);
  for (const PageId page : free_list_) {
    require(page < taken_pages_, "free page ", page, " does not exist");
    require(!free[page], "page ", page, " is twice on the free list");
    free[page] = true;
  }
  for (std::size_t page = 0; page < taken_pages_; ++page) {
    const PageHeader& header = this->header(static_cast<PageId>(page));
    const auto references = header.references.load(std::memory_order_relaxed);
    require(free[page] == (references == 0), "page ", page, " is ", free[page] ? "" : "not ",
            "on the free list with ", references, " references");
    require(header.epoch < next_epoch_.load(), "page ", page, " has epoch ", header.epoch,
            " of the future");
  }
  const std::size_t used = used_pages_.load(std::memory_order_relaxed);
  require(used + free_list_.size() == taken_pages_, used, " used and ", free_list_.size(),
          " free pages do not add up to ", taken_pages_);
}

}  // namespace icecache
