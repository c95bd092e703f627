// What every index promises of a selection: tokens within the budget, exact logits, and the
// rest seen through its nodes. Instantiated with the other tests of the contract.
#include <set>

#include "index_contract.h"

namespace icecache::testing::index_selection_test {
namespace {

TEST_P(IndexContract, PicksLiveTokensWithinTheBudget) {
  const Tokens all = tokens(420);
  const std::unique_ptr<Held> index = made(all, 300);
  index->truncate(kFirst + 400);
  for (const int budget : {0, 1, 7, 8, 50, 160}) {
    const Answer answer = ask(*index, queries(), budget);
    const Selection& selection = answer.selection;
    EXPECT_LE(selection.tokens, budget);
    if (std::string(GetParam().select) == "token" || budget >= kPageSize) {
      EXPECT_GE(selection.tokens, std::min(budget, budget - kPageSize + 1));
    }
    int slots = 0, previous = -1;
    for (const PagePick& pick : selection.picks) {
      EXPECT_GT(pick.local_page, previous);
      previous = pick.local_page;
      EXPECT_NE(pick.slots, 0u);
      slots += std::popcount(pick.slots);
      pool_->pool->verify(pick.page, pick.epoch, 2, 3);
    }
    EXPECT_EQ(slots, selection.tokens);
    std::vector<std::int32_t> positions;
    selector_.selected_positions(selection, positions);
    EXPECT_EQ(static_cast<int>(positions.size()), selection.tokens);
    EXPECT_EQ(std::set<std::int32_t>(positions.begin(), positions.end()).size(), positions.size());
    for (const std::int32_t position : positions) {
      EXPECT_GE(position, kFirst);
      EXPECT_LT(position, kFirst + 400);
    }
  }
}

TEST_P(IndexContract, TheWholeIndexIsFullAttention) {
  const Tokens given = tokens(150);
  const std::unique_ptr<Held> index = made(given, 100);
  const Tokens all = as_held(*index, given);
  const std::vector<float> q = queries();
  const Answer answer = ask(*index, q, 150);
  ASSERT_EQ(answer.selection.tokens, 150);
  for (int g = 0; g < kGroup; ++g) {
    std::vector<double> logits(150), out(kDim, 0.0);
    double sum = 0.0;
    for (int i = 0; i < 150; ++i) {
      for (int j = 0; j < kDim; ++j) {
        logits[i] += static_cast<double>(q[g * kDim + j]) * all.keys[i * kDim + j];
      }
      sum += std::exp(logits[i]);
      for (int j = 0; j < kDim; ++j) out[j] += std::exp(logits[i]) * all.values[i * kDim + j];
    }
    EXPECT_NEAR(answer.lse[g], std::log(sum), 1e-4);
    for (int j = 0; j < kDim; ++j) EXPECT_NEAR(answer.out[g * kDim + j], out[j] / sum, 1e-4);
  }
}

// Tokens that are not picked count by the mean of their values in each node, with what the node
// weighs; that is near what they weigh.
TEST_P(IndexContract, TheRestIsSeenThroughItsNodes) {
  const Tokens given = tokens(420);
  const std::unique_ptr<Held> index = made(given, 300);
  index->truncate(kFirst + 400);
  const Tokens all = as_held(*index, given);
  const double rounding = GetParam().dtype == DType::kFloat32    ? 0.0
                          : GetParam().dtype == DType::kBFloat16 ? 0x1p-8
                                                                 : 0x1p-11;
  for (const int budget : {0, 50, 160, 330}) {
    const std::vector<float> q = queries(budget);
    const Answer answer = ask(*index, q, budget);
    std::vector<FarNodeInfo> nodes;
    selector_.far_nodes(answer.selection, nodes);
    ASSERT_EQ(nodes.empty(), GetParam().tail == std::string("off"));
    std::vector<std::int32_t> picked;
    selector_.selected_positions(answer.selection, picked);
    std::vector<std::vector<int>> left(nodes.size());
    std::vector<int> members(nodes.size(), 0);
    for (const PageInfo& page : pages(*index)) {
      for (const std::int32_t position : page.positions) {
        if (nodes.empty()) continue;
        ++members[page.node];
        if (!std::binary_search(picked.begin(), picked.end(), position)) {
          left[page.node].push_back(position - kFirst);
        }
      }
    }
    for (int g = 0; g < kGroup; ++g) {
      const auto weight = [&](int token) {
        double logit = 0.0;
        for (int j = 0; j < kDim; ++j) {
          logit += double{q[g * kDim + j]} * all.keys[token * kDim + j];
        }
        return std::exp(logit);
      };
      double total = 0.0, rest = 0.0, exact_rest = 0.0;
      std::vector<double> out(kDim, 0.0), slack(kDim, 0.0);
      for (const std::int32_t position : picked) {
        const double w = weight(position - kFirst);
        total += w;
        for (int j = 0; j < kDim; ++j) out[j] += w * all.values[(position - kFirst) * kDim + j];
      }
      for (std::size_t c = 0; c < nodes.size(); ++c) {
        EXPECT_EQ(nodes[c].tokens, members[c]);
        const double w = std::exp(double{nodes[c].weight[g]}), n = left[c].size();
        if (left[c].empty()) {
          EXPECT_EQ(nodes[c].weight[g], -INFINITY) << "node " << c;
          continue;
        }
        rest += w;
        for (const int token : left[c]) {
          exact_rest += weight(token);
          for (int j = 0; j < kDim; ++j) out[j] += w / n * all.values[token * kDim + j];
        }
        // The mean over all members is rounded, then what is picked is taken out of it.
        for (int j = 0; j < kDim; ++j) slack[j] += w * rounding * members[c] / n;
      }
      total += rest;
      if (total == 0.0) continue;  // nothing picked, no far field
      EXPECT_NEAR(answer.lse[g], std::log(total), 1e-4) << budget;
      for (int j = 0; j < kDim; ++j) {
        EXPECT_NEAR(answer.out[g * kDim + j], out[j] / total, 1e-4 + slack[j] / total) << budget;
      }
      if (exact_rest > 0.0) {
        EXPECT_NEAR(answer.selection.rest_lse[g], std::log(rest), 1e-4) << budget;
        // Sketches of 4 bits; measured: at most 0.19 nats.
        EXPECT_NEAR(std::log(rest), std::log(exact_rest), 0.35) << budget;
      }
    }
  }
}

}  // namespace
}  // namespace icecache::testing::index_selection_test
