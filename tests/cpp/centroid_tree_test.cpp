#include "index/centroid_tree.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace icecache {
namespace {

constexpr int kRank = 4;
constexpr float kZero[kRank] = {};

TEST(CentroidTree, EmptyHasNoNearest) {
  CentroidTree tree(kRank);

  EXPECT_EQ(tree.nearest(kZero), -1);
  tree.add_leaf(-1, kZero, 0);
  EXPECT_EQ(tree.nearest(kZero), -1);
  tree.add(0, kZero);
  EXPECT_EQ(tree.nearest(kZero), 0);
  tree.set(0, kZero, 0);
  EXPECT_EQ(tree.nearest(kZero), -1);
}

TEST(CentroidTree, GreedyDescentFindsTheNearestLeafNearlyAlways) {
  CentroidTree tree(kRank);
  // Leaves on a line, each beside the one before: the descent can tell them apart.
  for (int leaf = 0; leaf < 300; ++leaf) {
    const float sum[kRank] = {static_cast<float>(leaf) * 3.0f, 0.0f, 0.0f, 0.0f};
    tree.add_leaf(leaf - 1, sum, 3);
  }
  tree.check_integrity();
  int found = 0;
  for (int leaf = 0; leaf < 300; ++leaf) {
    const float query[kRank] = {static_cast<float>(leaf) + 0.2f, 0.01f, 0.0f, 0.0f};
    found += tree.nearest(query) == leaf;
  }
  // Next to a border between subtrees of unlike width the descent may take the neighbour.
  EXPECT_GE(found, 285);
}

TEST(CentroidTree, SumsStayExactUnderRandomChange) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  CentroidTree tree(kRank);
  tree.add_leaf(-1, kZero, 0);
  for (int step = 0; step < 3000; ++step) {
    const int leaf = static_cast<int>(random() % static_cast<unsigned>(tree.leaf_count()));
    float x[kRank];
    for (float& value : x) value = 10.0f * normal(random);
    switch (random() % 4) {
      case 0:
        tree.add_leaf(leaf, x, 2);
        break;
      case 1:
        tree.set(leaf, x, static_cast<std::int32_t>(random() % 5));
        break;
      default:
        tree.add(leaf, x);
    }
    if (step % 100 == 0) tree.check_integrity();
  }
  tree.check_integrity();
  EXPECT_GT(tree.leaf_count(), 500);
}

TEST(CentroidTree, PassesOverEmptyLeaves) {
  CentroidTree tree(kRank);
  for (int leaf = 0; leaf < 40; ++leaf) tree.add_leaf(leaf - 1, kZero, 0);
  const float far[kRank] = {1e6f, 0.0f, 0.0f, 0.0f}, origin[kRank] = {};
  tree.set(17, far, 1);
  EXPECT_EQ(tree.nearest(origin), 17);
}

TEST(CentroidTree, CopiesAreIndependent) {
  CentroidTree tree(kRank);
  tree.add_leaf(-1, kZero, 0);
  const float x[kRank] = {1.0f, 2.0f, 3.0f, 4.0f};
  tree.add(0, x);
  CentroidTree copy = tree;
  copy.add_leaf(0, kZero, 0);
  copy.add(1, x);
  EXPECT_EQ(tree.leaf_count(), 1);
  tree.check_integrity();
  copy.check_integrity();
}

}  // namespace
}  // namespace icecache
