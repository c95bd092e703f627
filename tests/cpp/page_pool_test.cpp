#include "pages/page_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "cuda/cuda_info.h"
#include "icecache/error.h"
#include "refusal.h"

namespace icecache::page_pool_test {
namespace {

using testing::refusal;

constexpr std::size_t kPageBytes = 2 * 8 * 16 * 4;  // [2][S = 8][D = 16] fp32
constexpr PageOwner kOwner{7, 3, 1};

PagePool::Options options_for(std::size_t pages, Integrity integrity = Integrity::kOff) {
  PagePool::Options options;
  options.page_bytes = kPageBytes;
  options.capacity_bytes = pages * kPageBytes;
  options.integrity = integrity;
  options.poison_freed = true;
  return options;
}

void fill(PagePool& pool, PageId page, int value) {
  std::memset(pool.data(page), value, pool.page_bytes());
}

// ---- Capacity

TEST(PagePool, RefusesAPoolWithoutRoomForOnePage) {
  PagePool::Options options = options_for(1);
  options.capacity_bytes = kPageBytes - 1;
  const std::string text = refusal<InvalidArgument>([&] { PagePool pool(options); });
  EXPECT_MENTIONS(text, "1024 bytes, got 1023");
  options.page_bytes = 0;
  EXPECT_MENTIONS(refusal<InvalidArgument>([&] { PagePool pool(options); }), "page_bytes");
}

TEST(PagePool, TakesNoMemoryBeforeTheFirstPage) {
  PagePool pool(options_for(100));
  EXPECT_EQ(pool.allocated_bytes(), 0u);
  EXPECT_EQ(pool.used_pages(), 0u);
  EXPECT_EQ(pool.free_pages(), 100u);
  pool.check_integrity();
}

TEST(PagePool, CapacityIsRoundedDownToWholePages) {
  PagePool::Options options = options_for(3);
  options.capacity_bytes += kPageBytes - 1;
  PagePool pool(options);
  EXPECT_EQ(pool.capacity_pages(), 3u);
  for (int i = 0; i < 3; ++i) pool.allocate(kOwner);
  EXPECT_LE(pool.allocated_bytes(), options.capacity_bytes);
  EXPECT_THROW(pool.allocate(kOwner), OutOfPages);
}

TEST(PagePool, GrowsOverManySlabsUpToCapacityAndNoFurther) {
  PagePool::Options options;
  options.page_bytes = std::size_t{1} << 20;
  options.capacity_bytes = 21 * options.page_bytes;
  PagePool pool(options);
  std::vector<PageId> pages;
  std::size_t allocated = 0;
  for (int i = 0; i < 21; ++i) {
    pages.push_back(pool.allocate(kOwner));
    EXPECT_GE(pool.allocated_bytes(), allocated);
    allocated = pool.allocated_bytes();
    EXPECT_LE(allocated, options.capacity_bytes);
    std::memset(pool.data(pages.back()), i, 64);
  }
  EXPECT_THROW(pool.allocate(kOwner), OutOfPages);
  for (int i = 0; i < 21; ++i) EXPECT_EQ(pool.data(pages[i])[63], std::byte(i));
  for (const PageId page : pages) pool.release(page);
  EXPECT_EQ(pool.allocated_bytes(), allocated) << "slabs are kept";
  pool.check_integrity();
}

TEST(PagePool, PagesDoNotOverlapAndKeepTheirAddress) {
  PagePool pool(options_for(64));
  std::vector<PageId> pages;
  std::vector<std::byte*> addresses;
  for (int i = 0; i < 64; ++i) {
    pages.push_back(pool.allocate(kOwner));
    addresses.push_back(pool.data(pages.back()));
    fill(pool, pages.back(), i);
  }
  for (int i = 0; i < 64; ++i) {
    EXPECT_EQ(pool.data(pages[i]), addresses[i]);
    for (std::size_t b = 0; b < kPageBytes; ++b) ASSERT_EQ(addresses[i][b], std::byte(i));
  }
  EXPECT_EQ(std::set<PageId>(pages.begin(), pages.end()).size(), 64u);
}

TEST(PagePool, OutOfPagesNamesTheNumbersAndChangesNothing) {
  PagePool pool(options_for(10));
  std::vector<PageId> pages;
  pool.allocate(7, kOwner, pages);
  std::vector<PageId> more{42};
  const std::string text = refusal<OutOfPages>([&] { pool.allocate(4, kOwner, more); });
  EXPECT_MENTIONS(text, "4 more pages");
  EXPECT_MENTIONS(text, "7 of 10 pages of 1024 bytes");
  EXPECT_MENTIONS(text, "10240");
  EXPECT_EQ(more, std::vector<PageId>{42});
  EXPECT_EQ(pool.used_pages(), 7u);
  pool.check_integrity();

  pool.allocate(3, kOwner, more);
  EXPECT_EQ(more.size(), 4u);
  EXPECT_EQ(pool.free_pages(), 0u);
  EXPECT_THROW(pool.allocate(kOwner), OutOfPages);
  pool.release(pages.back());
  EXPECT_NO_THROW(pool.allocate(kOwner));
}

TEST(PagePool, AllocatingNoPagesIsAllowed) {
  PagePool pool(options_for(1));
  std::vector<PageId> pages;
  pool.allocate(0, kOwner, pages);
  EXPECT_TRUE(pages.empty());
  EXPECT_EQ(pool.used_pages(), 0u);
}

TEST(PagePool, PinnedMemoryIsRefusedWithoutADevice) {
  PagePool::Options options = options_for(1);
  options.pinned = true;
  const auto allocate = [&] { PagePool(options).allocate(kOwner); };
  if (cuda_info().devices > 0) {
    EXPECT_NO_THROW(allocate());
  } else {
    EXPECT_MENTIONS(refusal<Unavailable>(allocate), "page-locked");
  }
}

// ---- References

TEST(PagePool, APageIsFreeWhenItsLastReferenceIsGone) {
  PagePool pool(options_for(2));
  const PageId page = pool.allocate(kOwner);
  EXPECT_TRUE(pool.unique(page));
  pool.retain(page);
  EXPECT_FALSE(pool.unique(page));
  pool.release(page);
  EXPECT_TRUE(pool.unique(page));
  EXPECT_EQ(pool.used_pages(), 1u);
  pool.check_integrity();
  pool.release(page);
  EXPECT_EQ(pool.used_pages(), 0u);
  pool.check_integrity();
}

TEST(PagePool, SharedPagesKeepTheirContent) {
  PagePool pool(options_for(2));
  const PageId page = pool.allocate(kOwner);
  fill(pool, page, 5);
  pool.retain(page);
  pool.release(page);
  EXPECT_EQ(pool.data(page)[0], std::byte{5});
}

TEST(PagePool, FreedPagesReadAsNaN) {
  PagePool pool(options_for(1));
  const PageId page = pool.allocate(kOwner);
  fill(pool, page, 0);
  pool.release(page);
  const PageId again = pool.allocate(kOwner);
  ASSERT_EQ(again, page);
  for (std::size_t i = 0; i < kPageBytes; ++i) {
    ASSERT_EQ(pool.data(again)[i], std::byte{0xff});
  }
  float value;
  std::memcpy(&value, pool.data(again), sizeof(value));
  EXPECT_TRUE(std::isnan(value));
}

TEST(PagePool, NewPagesReadAsNaNWherePoisoned) {
  PagePool pool(options_for(1));
  const PageId page = pool.allocate(kOwner);
  EXPECT_EQ(pool.data(page)[kPageBytes - 1], std::byte{0xff});
}

// ---- Headers and integrity

TEST(PagePool, HeaderNamesTheOwner) {
  PagePool pool(options_for(1));
  const PageHeader& header = pool.header(pool.allocate(kOwner));
  EXPECT_EQ(header.sequence, 7);
  EXPECT_EQ(header.layer, 3);
  EXPECT_EQ(header.head, 1);
  EXPECT_EQ(header.epoch, 0u);
}

TEST(PagePool, EpochsStrictlyIncreaseOverAllPages) {
  PagePool pool(options_for(2));
  const PageId a = pool.allocate(kOwner), b = pool.allocate(kOwner);
  const auto first = pool.seal(a), second = pool.seal(b), third = pool.seal(a);
  EXPECT_LT(0u, first);
  EXPECT_LT(first, second);
  EXPECT_LT(second, third);
  EXPECT_EQ(pool.header(a).epoch, third);
}

TEST(PagePool, ChecksumsAreTakenOnlyWhereIntegrityIsOn) {
  PagePool off(options_for(1)), on(options_for(1, Integrity::kSampled));
  const PageId a = off.allocate(kOwner), b = on.allocate(kOwner);
  off.seal(a);
  on.seal(b);
  EXPECT_EQ(off.header(a).checksum, 0u);
  EXPECT_NE(on.header(b).checksum, 0u);
}

TEST(PagePool, VerifyAcceptsWhatWasSealed) {
  for (const Integrity mode : {Integrity::kOff, Integrity::kSampled, Integrity::kAlways}) {
    PagePool pool(options_for(1, mode));
    const PageId page = pool.allocate(kOwner);
    fill(pool, page, 9);
    const auto epoch = pool.seal(page);
    for (int i = 0; i < 200; ++i) EXPECT_NO_THROW(pool.verify(page, epoch, 3, 1));
  }
}

TEST(PagePool, VerifyTellsAReusedPageFromItsFormerContent) {
  PagePool pool(options_for(1, Integrity::kSampled));
  const PageId page = pool.allocate(kOwner);
  const auto epoch = pool.seal(page);
  pool.release(page);
  EXPECT_MENTIONS(refusal<IntegrityError>([&] { pool.verify(page, epoch, 3, 1); }), "free");
  ASSERT_EQ(pool.allocate(kOwner), page);
  EXPECT_THROW(pool.verify(page, epoch, 3, 1), IntegrityError) << "not sealed yet";
  const auto later = pool.seal(page);
  const std::string text = refusal<IntegrityError>([&] { pool.verify(page, epoch, 3, 1); });
  EXPECT_MENTIONS(text, "epoch " + std::to_string(epoch) + " was expected");
  EXPECT_MENTIONS(text, "has " + std::to_string(later));
  EXPECT_NO_THROW(pool.verify(page, later, 3, 1));
}

TEST(PagePool, VerifyNamesForeignLayerAndHead) {
  PagePool pool(options_for(1, Integrity::kSampled));
  const PageId page = pool.allocate(kOwner);
  const auto epoch = pool.seal(page);
  const std::string layer = refusal<IntegrityError>([&] { pool.verify(page, epoch, 4, 1); });
  EXPECT_MENTIONS(layer, "page 0 (sequence 7, layer 3, head 1): layer 4 was expected");
  const std::string head = refusal<IntegrityError>([&] { pool.verify(page, epoch, 3, 0); });
  EXPECT_MENTIONS(head, "head 0 was expected");
}

TEST(PagePool, VerifyFindsOneFlippedBitAnywhere) {
  PagePool pool(options_for(1, Integrity::kAlways));
  const PageId page = pool.allocate(kOwner);
  fill(pool, page, 0x3c);
  const auto epoch = pool.seal(page);
  for (std::size_t at = 0; at < kPageBytes; at += 37) {
    pool.data(page)[at] ^= std::byte{0x10};
    EXPECT_MENTIONS(refusal<IntegrityError>([&] { pool.verify(page, epoch, 3, 1); }), "altered");
    pool.data(page)[at] ^= std::byte{0x10};
    EXPECT_NO_THROW(pool.verify(page, epoch, 3, 1));
  }
}

TEST(PagePool, SampledVerifyReadsTheBytesOnEvery64thCall) {
  PagePool pool(options_for(1, Integrity::kSampled));
  const PageId page = pool.allocate(kOwner);
  const auto epoch = pool.seal(page);
  pool.data(page)[100] ^= std::byte{1};
  int found = 0;
  for (int i = 0; i < 640; ++i) {
    found += !refusal<IntegrityError>([&] { pool.verify(page, epoch, 3, 1); }).empty();
  }
  EXPECT_EQ(found, 10);
}

TEST(PagePool, VerifyIsSilentWhereIntegrityIsOff) {
  PagePool pool(options_for(1));
  const PageId page = pool.allocate(kOwner);
  pool.seal(page);
  EXPECT_NO_THROW(pool.verify(page, 12345, 9, 9));
}

TEST(PagePool, VerifyRefusesIdsThatDoNotExist) {
  PagePool pool(options_for(4, Integrity::kAlways));
  EXPECT_MENTIONS(refusal<IntegrityError>([&] { pool.verify(4, 1, 3, 1); }), "does not exist");
  EXPECT_MENTIONS(refusal<IntegrityError>([&] { pool.verify(0, 1, 3, 1); }), "does not exist");
  EXPECT_MENTIONS(refusal<IntegrityError>([&] { pool.verify(kNoPage, 1, 3, 1); }), "4 pages");
}

// ---- Random traces against a model, and threads

TEST(PagePool, RandomTraceAgreesWithAModel) {
  PagePool pool(options_for(50, Integrity::kAlways));
  struct Held {
    PageId page;
    int references;
    int value;
    std::uint64_t epoch;
  };
  std::vector<Held> held;
  std::mt19937 random(1);
  for (int step = 0; step < 5000; ++step) {
    const auto at = held.empty() ? 0 : random() % held.size();
    const unsigned choice = random() % 4;
    if (choice == 0 || held.empty()) {
      const std::size_t count = random() % 6;
      std::vector<PageId> pages;
      if (count > 50 - held.size()) {
        EXPECT_THROW(pool.allocate(count, kOwner, pages), OutOfPages);
        continue;
      }
      pool.allocate(count, kOwner, pages);
      for (const PageId page : pages) {
        const int value = static_cast<int>(random() % 250);
        fill(pool, page, value);
        held.push_back({page, 1, value, pool.seal(page)});
      }
    } else if (choice == 1) {
      pool.retain(held[at].page);
      ++held[at].references;
    } else if (choice == 2) {
      ASSERT_EQ(pool.data(held[at].page)[step % kPageBytes], std::byte(held[at].value));
      ASSERT_NO_THROW(pool.verify(held[at].page, held[at].epoch, 3, 1));
      ASSERT_EQ(pool.unique(held[at].page), held[at].references == 1);
    } else {
      pool.release(held[at].page);
      if (--held[at].references == 0) held.erase(held.begin() + static_cast<std::ptrdiff_t>(at));
    }
    ASSERT_EQ(pool.used_pages(), held.size());
  }
  pool.check_integrity();
}

TEST(PagePool, ThreadsAllocateShareAndReleaseWithoutLosingPages) {
  constexpr int kThreads = 4, kRounds = 2000;
  PagePool::Options options = options_for(0, Integrity::kAlways);
  options.page_bytes = 64 << 10;  // several slabs, so that growth and reads overlap
  options.capacity_bytes = 300 * options.page_bytes;
  PagePool pool(options);
  const PageId shared = pool.allocate(kOwner);
  const auto shared_epoch = pool.seal(shared);
  std::vector<std::thread> threads;
  std::atomic<int> refused{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const PageOwner owner{t, t, t};
      std::vector<std::pair<PageId, std::uint64_t>> mine;
      std::mt19937 random(t);
      for (int round = 0; round < kRounds; ++round) {
        pool.retain(shared);
        if (mine.size() < 100 && random() % 2 == 0) {
          try {
            const PageId page = pool.allocate(owner);
            std::memset(pool.data(page), t, 64);
            mine.emplace_back(page, pool.seal(page));
          } catch (const OutOfPages&) {
            ++refused;
          }
        } else if (!mine.empty()) {
          const auto [page, epoch] = mine.back();
          mine.pop_back();
          EXPECT_NO_THROW(pool.verify(page, epoch, t, t));
          EXPECT_EQ(pool.data(page)[0], std::byte(t));
          pool.release(page);
        }
        if (round % 100 == 0) {
          EXPECT_NO_THROW(pool.verify(shared, shared_epoch, 3, 1));
        }
        pool.release(shared);
      }
      for (const auto& [page, epoch] : mine) pool.release(page);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.used_pages(), 1u);
  EXPECT_TRUE(pool.unique(shared));
  pool.check_integrity();
}

TEST(PagePool, EpochsAreUniqueAcrossThreads) {
  PagePool pool(options_for(4));
  std::vector<std::vector<std::uint64_t>> epochs(4);
  std::vector<std::thread> threads;
  for (auto& list : epochs) {
    threads.emplace_back([&] {
      const PageId page = pool.allocate(kOwner);
      for (int i = 0; i < 1000; ++i) list.push_back(pool.seal(page));
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::set<std::uint64_t> all;
  for (const auto& list : epochs) {
    EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
    all.insert(list.begin(), list.end());
  }
  EXPECT_EQ(all.size(), 4000u);
}

TEST(PagePool, TheLastOfManyReleasesFreesThePageOnce) {
  PagePool pool(options_for(1));
  for (int round = 0; round < 200; ++round) {
    const PageId page = pool.allocate(kOwner);
    pool.retain(page);
    std::thread other([&] { pool.release(page); });
    pool.release(page);
    other.join();
    ASSERT_EQ(pool.used_pages(), 0u);
  }
  pool.check_integrity();
}

}  // namespace
}  // namespace icecache::page_pool_test
