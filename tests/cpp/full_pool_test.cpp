// A pool that is nearly full: what fits, and what an index becomes, does not depend on timing.
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "icecache/engine.h"
#include "icecache/error.h"

namespace icecache::full_pool_test {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kPoolPages[] = {210, 420, 4000};
#else
constexpr int kPoolPages[] = {130, 170, 210, 240, 270, 300, 340, 380, 420, 460, 600, 4000};
#endif
constexpr int kLayers = 2, kQueryHeads = 4, kHeads = 2, kDim = 16, kPage = 8;

struct Timing {
  int num_threads = 1, index_threads = 1;
  unsigned disturbance = 0;  // seed of pauses and calls that only wait; 0: none
};

class Trial {
 public:
  Trial(const std::string& index, int pages, const Timing& timing)
      : engine_(shape(), config(index, pages, timing)),
        disturbs_(timing.disturbance != 0),
        disturbance_(timing.disturbance) {}

  // What all calls answered: outputs, and a mark for each that was refused.
  std::vector<float> answers() {
    std::vector<SeqId> ids;
    for (int s = 0; s < 4; ++s) {
      ids.push_back(engine_.new_sequence());
      step({ids.back()}, 30, Phase::kPrefill);
      step({ids.back()}, 31, Phase::kPromptEnd);
      for (int i = 0; i < 6; ++i) step(ids, 1, Phase::kAuto);
    }
    ids.push_back(engine_.fork(ids[1]));
    engine_.truncate(ids[0], engine_.length(ids[0], 1) / 2);
    for (int i = 0; i < 70; ++i) step(ids, i % 9 == 8 ? 3 : 1, Phase::kAuto);
    engine_.release(ids[2]);
    ids.erase(ids.begin() + 2);
    step({ids[0]}, 25, Phase::kPromptEnd);
    for (int i = 0; i < 20; ++i) step(ids, 1, Phase::kAuto);
    engine_.check_integrity();
    answers_.push_back(static_cast<float>(engine_.pool_bytes()));
    return std::move(answers_);
  }
  int refused() const { return refused_; }

 private:
  static CacheShape shape() {
    CacheShape shape;
    shape.num_layers = kLayers;
    shape.num_q_heads = kQueryHeads;
    shape.num_kv_heads = kHeads;
    shape.head_dim = kDim;
    return shape;
  }
  static Config config(const std::string& index, int pages, const Timing& timing) {
    Config config;
    config.index = index;
    config.page_size = kPage;
    config.token_budget = 24;
    config.sink_tokens = 4;
    config.window_tokens = 8;
    config.candidates = 24;
    config.host_memory = static_cast<std::int64_t>(pages) * 2 * kPage * kDim * 4;
    config.num_threads = timing.num_threads;
    config.index_threads = timing.index_threads;
    return config;
  }

  void step(const std::vector<SeqId>& ids, int tokens, Phase phase) {
    for (int layer = 0; layer < kLayers; ++layer) {
      std::vector<std::vector<float>> data;
      std::vector<TensorView> k, v, q, o;
      const auto add = [&](std::vector<TensorView>& views, int heads) {
        std::vector<float>& x = data.emplace_back(heads * tokens * kDim);
        for (float& value : x) value = normal_(random_);
        views.push_back({x.data(), DType::kFloat32, heads, tokens, kDim, tokens * kDim, kDim});
      };
      data.reserve(4 * ids.size());
      for (std::size_t b = 0; b < ids.size(); ++b) {
        add(k, kHeads);
        add(v, kHeads);
        add(q, kQueryHeads);
        add(o, kQueryHeads);
      }
      disturb();
      try {
        engine_.step(ids, layer, k, v, q, o, std::vector<Phase>(ids.size(), phase));
        for (std::size_t b = 0; b < ids.size(); ++b) {
          const std::vector<float>& out = data[4 * b + 3];
          answers_.insert(answers_.end(), out.begin(), out.end());
        }
      } catch (const OutOfPages&) {
        answers_.push_back(-1000.0f);
        ++refused_;
      }
    }
  }

  void disturb() {
    if (!disturbs_) return;
    switch (disturbance_() % 4) {
      case 0:
        return engine_.synchronize();
      case 1:
        return std::this_thread::sleep_for(std::chrono::microseconds(disturbance_() % 400));
      default:
        return;
    }
  }

  Engine engine_;
  std::mt19937 random_{7};
  std::normal_distribution<float> normal_;
  bool disturbs_;
  std::mt19937 disturbance_;
  std::vector<float> answers_;
  int refused_ = 0;
};

class FullPool : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Index, FullPool, ::testing::Values("tree", "dci", "positional"));

TEST_P(FullPool, TimingDoesNotShow) {
  int refusing = 0, roomy = 0;
  for (const int pages : kPoolPages) {
    Trial first(GetParam(), pages, {});
    const std::vector<float> expected = first.answers();
    (first.refused() > 0 ? refusing : roomy) += 1;
    for (const Timing& timing :
         {Timing{1, 3, 0}, Timing{3, 1, 1}, Timing{3, 3, 2}, Timing{2, 2, 3}, Timing{1, 2, 4}}) {
      EXPECT_TRUE(Trial(GetParam(), pages, timing).answers() == expected)
          << "another answer with " << pages << " pages, " << timing.index_threads
          << " index threads, disturbance " << timing.disturbance;
    }
  }
  EXPECT_GT(refusing, 0);
  EXPECT_GT(roomy, 0);
}

}  // namespace
}  // namespace icecache::full_pool_test
