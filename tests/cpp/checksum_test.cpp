#include "pages/checksum.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

namespace icecache::checksum_test {
namespace {

TEST(Checksum, DependsOnEveryByteTheOrderAndTheLength) {
  std::vector<std::byte> bytes(333);
  std::mt19937 random(3);
  for (std::byte& b : bytes) b = std::byte(random() & 0xff);
  std::set<std::uint64_t> sums{checksum(bytes.data(), bytes.size())};
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] ^= std::byte{0x80};
    sums.insert(checksum(bytes.data(), bytes.size()));
    bytes[i] ^= std::byte{0x80};
  }
  EXPECT_EQ(sums.size(), bytes.size() + 1);
  std::swap_ranges(bytes.begin(), bytes.begin() + 64, bytes.begin() + 64);
  EXPECT_TRUE(sums.insert(checksum(bytes.data(), bytes.size())).second) << "blocks exchanged";

  const std::vector<std::byte> zeros(200);
  sums.clear();
  for (std::size_t n = 0; n <= zeros.size(); ++n) sums.insert(checksum(zeros.data(), n));
  EXPECT_EQ(sums.size(), zeros.size() + 1);
  EXPECT_FALSE(sums.contains(0));
}

TEST(Checksum, DoesNotDependOnAlignment) {
  std::vector<std::byte> bytes(1000, std::byte{0x5a});
  EXPECT_EQ(checksum(bytes.data(), 900), checksum(bytes.data() + 3, 900));
}

}  // namespace
}  // namespace icecache::checksum_test
