#include "core/residency.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "core/emulated_device.h"
#include "icecache/error.h"
#include "refusal.h"

namespace icecache::residency_test {
namespace {

using testing::refusal;

constexpr std::size_t kPageBytes = 512;
constexpr PageOwner kOwner{1, 2, 3};

class ResidencyTest : public ::testing::Test {
 protected:
  void SetUp() override { make(3); }
  void make(std::size_t slots, std::size_t pages = 16) {
    residency_.reset();
    PagePool::Options options;
    options.page_bytes = kPageBytes;
    options.capacity_bytes = pages * kPageBytes;
    pool_ = std::make_unique<PagePool>(options);
    residency_ = std::make_unique<Residency>(*pool_, make_emulated_device(), slots);
    picks_.clear();
    for (std::size_t i = 0; i < pages; ++i) {
      PagePick pick;
      pick.page = pool_->allocate(kOwner);
      pick.slots = 1;
      picks_.push_back(pick);
      write(i, static_cast<int>(i));
    }
  }
  // New content for a page.
  void write(std::size_t i, int value) {
    std::memset(pool_->data(picks_[i].page), value, kPageBytes);
    picks_[i].epoch = pool_->seal(picks_[i].page);
  }

  Residency::Lease acquire(const std::vector<int>& numbers) {
    std::vector<PagePick> picks;
    for (const int i : numbers) picks.push_back(picks_[i]);
    Residency::Lease lease = residency_->acquire(picks);
    residency_->check_integrity();
    return lease;
  }
  static bool holds(const std::byte* page, int value) {
    for (std::size_t i = 0; i < kPageBytes; ++i) {
      if (page[i] != std::byte(value)) return false;
    }
    return true;
  }

  std::unique_ptr<PagePool> pool_;
  std::unique_ptr<Residency> residency_;
  std::vector<PagePick> picks_;
};

TEST_F(ResidencyTest, InPlacePagesAreReadWhereTheyAre) {
  Residency in_place(*pool_, nullptr, 0);
  EXPECT_TRUE(in_place.in_place());
  const Residency::Lease lease = in_place.acquire(picks_);
  for (std::size_t i = 0; i < picks_.size(); ++i) {
    EXPECT_EQ(lease.page(i), pool_->data(picks_[i].page));
  }
  EXPECT_EQ(lease.hits, 0);
  EXPECT_EQ(lease.misses, 0);
  EXPECT_EQ(lease.bytes_moved, 0);
}

TEST_F(ResidencyTest, AMissCopiesAndTheNextAcquireHits) {
  {
    const Residency::Lease lease = acquire({0, 1});
    EXPECT_EQ(lease.hits, 0);
    EXPECT_EQ(lease.misses, 2);
    EXPECT_EQ(lease.bytes_moved, static_cast<std::int64_t>(2 * kPageBytes));
    EXPECT_TRUE(holds(lease.page(0), 0));
    EXPECT_TRUE(holds(lease.page(1), 1));
    EXPECT_NE(lease.page(0), pool_->data(picks_[0].page));
    EXPECT_EQ(residency_->stats().pinned, 2);
  }
  EXPECT_EQ(residency_->stats().pinned, 0);
  const Residency::Lease lease = acquire({1, 0, 2});
  EXPECT_EQ(lease.hits, 2);
  EXPECT_EQ(lease.misses, 1);
  EXPECT_TRUE(holds(lease.page(0), 1));
  EXPECT_TRUE(holds(lease.page(2), 2));
}

TEST_F(ResidencyTest, TheLeastRecentlyUsedPageIsEvicted) {
  for (const int i : {0, 1, 2, 0}) acquire({i});
  acquire({3});  // 1 was used longest ago
  EXPECT_EQ(residency_->stats().evictions, 1);
  EXPECT_EQ(acquire({0}).hits, 1);
  EXPECT_EQ(acquire({2}).hits, 1);
  EXPECT_EQ(acquire({3}).hits, 1);
  EXPECT_EQ(acquire({1}).misses, 1);
}

TEST_F(ResidencyTest, PinnedPagesAreNotEvicted) {
  const Residency::Lease pinned = acquire({0, 1});
  for (const int i : {2, 3, 4, 5}) {
    EXPECT_TRUE(holds(acquire({i}).page(0), i));
    EXPECT_TRUE(holds(pinned.page(0), 0));
    EXPECT_TRUE(holds(pinned.page(1), 1));
  }
  EXPECT_EQ(acquire({0, 1}).hits, 2);
}

TEST_F(ResidencyTest, AWrittenPageIsAMiss) {
  const Residency::Lease old = acquire({0});
  write(0, 99);
  const Residency::Lease fresh = acquire({0});
  EXPECT_EQ(fresh.misses, 1);
  EXPECT_TRUE(holds(fresh.page(0), 99));
  EXPECT_TRUE(holds(old.page(0), 0)) << "what was leased must stay";
}

TEST_F(ResidencyTest, TheSamePageTwiceTakesOneSlot) {
  const Residency::Lease lease = acquire({
      4,
      4,
      4,
  });
  EXPECT_EQ(lease.misses, 1);
  EXPECT_EQ(lease.page(0), lease.page(2));
  EXPECT_EQ(residency_->stats().resident, 1);
}

TEST_F(ResidencyTest, MorePagesThanSlotsAreRefusedWithBothNumbers) {
  const std::string text = refusal<OutOfPages>([&] { acquire({0, 1, 2, 3}); });
  EXPECT_MENTIONS(text, "device_pages");
  EXPECT_MENTIONS(text, "4, got 3");
  EXPECT_EQ(residency_->stats().pinned, 0);
  EXPECT_EQ(residency_->capacity(), 3u);
  EXPECT_EQ(acquire({0, 1, 2}).misses, 3);
}

TEST_F(ResidencyTest, AForgottenPageIsAMiss) {
  acquire({0, 1});
  residency_->forget(picks_[0].page);
  residency_->forget(picks_[9].page);  // never was there
  EXPECT_EQ(acquire({1}).hits, 1);
  EXPECT_EQ(acquire({0}).misses, 1);
}

TEST_F(ResidencyTest, PrefetchedPagesAreHitsWithTheRightContent) {
  residency_->prefetch(std::span(picks_).first(2));
  const Residency::Lease lease = acquire({0, 1});
  EXPECT_EQ(lease.hits, 2);
  EXPECT_TRUE(holds(lease.page(0), 0));
  EXPECT_TRUE(holds(lease.page(1), 1));
  EXPECT_EQ(residency_->stats().bytes_moved, static_cast<std::int64_t>(2 * kPageBytes));
}

TEST_F(ResidencyTest, PrefetchStopsBeforeItEvictsPinnedPagesOrItsOwn) {
  const Residency::Lease pinned = acquire({0, 1});
  residency_->prefetch(std::span(picks_).subspan(2, 6));
  residency_->check_integrity();
  EXPECT_TRUE(holds(pinned.page(0), 0));
  EXPECT_EQ(acquire({2}).hits, 1);
  EXPECT_EQ(acquire({3}).misses, 1);
}

TEST_F(ResidencyTest, AnAcquireWaitsForSlotsThatOthersHold) {
  std::atomic<bool> got{false};
  std::thread other;
  {
    const Residency::Lease lease = acquire({0, 1});
    other = std::thread([&] {
      const Residency::Lease second = acquire({2, 3});
      EXPECT_TRUE(holds(second.page(0), 2));
      EXPECT_TRUE(holds(second.page(1), 3));
      got = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(got);
    EXPECT_TRUE(holds(lease.page(1), 1));
  }
  other.join();
  EXPECT_TRUE(got);
}

TEST_F(ResidencyTest, LeasesMove) {
  Residency::Lease a = acquire({0, 1, 2});
  Residency::Lease b = std::move(a);
  EXPECT_TRUE(holds(b.page(2), 2));
  EXPECT_EQ(residency_->stats().pinned, 3);
  b = acquire({0});
  EXPECT_EQ(residency_->stats().pinned, 1);
  b = {};
  EXPECT_EQ(residency_->stats().pinned, 0);
}

TEST_F(ResidencyTest, ThreadsReadWhatTheyAskedFor) {
  make(6, 40);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int round = 0; round < 300; ++round) {
        std::vector<int> numbers(1 + random() % 4);
        for (int& i : numbers) i = static_cast<int>(random() % 40);
        if (round % 7 == 0) residency_->prefetch(std::span(picks_).subspan(numbers[0] / 2, 3));
        const Residency::Lease lease = acquire(numbers);
        for (std::size_t i = 0; i < numbers.size(); ++i) {
          ASSERT_TRUE(holds(lease.page(i), numbers[i]));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const ResidencyStats stats = residency_->stats();
  EXPECT_EQ(stats.pinned, 0);
  EXPECT_GT(stats.hits, 0);
  EXPECT_GT(stats.evictions, 0);
}

}  // namespace
}  // namespace icecache::residency_test
