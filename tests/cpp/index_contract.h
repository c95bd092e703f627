// The indexes of which every test of the contract (index/semantic_index.h, index/segment.h,
// index/selector.h) is made: each index, unit of picking, far field and dtype.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "host/make_index.h"
#include "icecache/engine.h"
#include "index/query_moments.h"
#include "index/selection.h"
#include "index/selector.h"
#include "pages/stored_tokens.h"
#include "pool_fixture.h"

namespace icecache::testing {

constexpr int kDim = 32, kGroup = 3, kPageSize = 8;

struct Variant {
  const char* index;
  const char* faiss_search;
  const char* select;
  const char* tail;
  DType dtype;
  const char* kv_dtype = "auto";

  bool has_codes() const { return std::string(kv_dtype) == "int8"; }
};

inline std::vector<Variant> variants() {
  std::vector<Variant> result;
  for (const char* index : {"tree", "dci", "positional", "faiss"}) {
    for (const char* select : {"token", "page"}) {
      for (const char* tail : {"on", "off"}) {
        for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
          result.push_back({index, "sketch", select, tail, dtype});
        }
      }
      result.push_back({index, "sketch", select, "on", DType::kBFloat16, "int8"});
    }
  }
  for (const char* search : {"flat", "ivf", "hnsw"}) {
    result.push_back({"faiss", search, "token", "on", DType::kFloat32});
  }
  return result;
}

inline std::string variant_name(const ::testing::TestParamInfo<Variant>& info) {
  const Variant& v = info.param;
  return std::string(v.index) + "_" + v.faiss_search + "_" + v.select + "_tail_" + v.tail + "_" +
         std::string(name_of(v.dtype)) + (v.has_codes() ? "_int8" : "");
}

// The tokens of a head as HeadCache holds them: two segments and the tokens that follow, or an
// index that grows.
class Held {
 public:
  explicit Held(const HeadContext& context) : context_(context) {}
  Held(const Held& other)
      : context_(other.context_),
        moments_(other.moments_),
        segments_(other.segments_),
        growing_(other.growing_ ? other.growing_->fork() : nullptr) {}

  void build(const TokenBlock& tokens, const QueryMoments& moments) {
    if (grows(*context_.config)) {
      StoredTokens stored(context_, tokens.count, tokens.first_position);
      stored.add(tokens);
      growing_ = make_growing_index(context_);
      return growing_->build(stored.block(), moments);
    }
    const std::size_t row = context_.row_bytes();
    const std::int32_t first = std::max(1, tokens.count * 3 / 5);
    moments_ = moments;
    for (const auto& [begin, end] : {std::pair{0, first}, std::pair{first, tokens.count}}) {
      if (begin == end) continue;
      add_segment({tokens.keys + begin * row, tokens.values + begin * row, end - begin,
                   tokens.first_position + begin});
    }
  }
  void insert(const TokenBlock& tokens) {
    if (growing_) return growing_->insert(tokens);
    add_segment(tokens);
  }
  void truncate(std::int32_t position) {
    if (growing_) growing_->truncate(position);
    while (!segments_.empty() && segments_.back().first_position() >= position) {
      segments_.pop_back();
    }
    if (segments_.empty() || segments_.back().end_position() <= position) return;
    segments_.back() = segments_.back().cut(position);
  }
  std::vector<Segment> segments() const {
    std::vector<Segment> all = segments_;
    if (growing_ && growing_->size() > 0) all.emplace_back(*growing_);
    return all;
  }
  std::int32_t size() const {
    std::int32_t tokens = 0;
    for (const Segment& segment : segments()) tokens += segment.size();
    return tokens;
  }
  void gather(std::byte* keys, std::byte* values) const {
    for (const Segment& segment : segments()) {
      segment.gather(keys, values);
      keys += segment.size() * context_.head_dim * size_of(context_.dtype);
      values += segment.size() * context_.head_dim * size_of(context_.dtype);
    }
  }
  void check_integrity() const {
    for (const Segment& segment : segments()) segment.check_integrity();
  }
  std::size_t node_count() const {
    std::size_t nodes = 0;
    for (const Segment& segment : segments()) nodes += segment.index().node_count();
    return nodes;
  }

 private:
  void add_segment(const TokenBlock& tokens) {
    StoredTokens stored(context_, tokens.count, tokens.first_position);
    if (!segments_.empty()) stored.set_format(segments_.front().index().table().format());
    stored.add(tokens);
    std::unique_ptr<SemanticIndex> index = make_index(context_);
    index->build(stored.block(), moments_);
    segments_.emplace_back(std::move(index));
  }

  HeadContext context_;
  QueryMoments moments_;
  std::vector<Segment> segments_;
  std::unique_ptr<GrowingIndex> growing_;
};

class IndexContract : public ::testing::TestWithParam<Variant> {
 protected:
  void SetUp() override {
    use_pages(400);
    if (std::string(GetParam().index) == "faiss" && !build_info().faiss) {
      GTEST_SKIP() << "index=faiss is not in this build (ICECACHE_FAISS)";
    }
  }

  void use_pages(std::size_t pages) {
    const Variant& variant = GetParam();
    pool_ = std::make_unique<PoolFixture>(pages, kPageSize, kDim, kGroup, variant.dtype);
    Config config;
    config.index = variant.index;
    config.faiss_search = variant.faiss_search;
    config.select = variant.select;
    config.tail = variant.tail;
    config.kv_dtype = variant.kv_dtype;
    config.page_size = kPageSize;
    config.far_node_tokens = 32;
    CacheShape shape;
    shape.num_layers = 1;
    shape.num_q_heads = kGroup;
    shape.num_kv_heads = 1;
    shape.head_dim = kDim;
    shape.dtype = variant.dtype;
    pool_->config = config.resolved(shape);
  }

  Tokens tokens(int n, unsigned seed = 1) {
    return clustered_tokens(n, kDim, GetParam().dtype, seed);
  }

  // An index of the first `built` tokens at once and the others one call each of 1, 2, 3, ..
  // tokens.
  std::unique_ptr<Held> made(const Tokens& all, int built) {
    auto index = std::make_unique<Held>(pool_->context);
    index->build(all.block(0, built, kFirst), moments(all));
    for (int at = built, n = 1; at < all.count(); at += n, ++n) {
      n = std::min(n, all.count() - at);
      index->insert(all.block(at, n, kFirst + at));
    }
    return index;
  }

  // Queries that look like keys.
  static QueryMoments moments(const Tokens& all) {
    QueryMoments moments;
    moments.observe(all.keys.data(), std::min(64, all.count()), kDim);
    return moments;
  }

  void expect_holds(const Held& index, const Tokens& all, int count) {
    index.check_integrity();
    ASSERT_EQ(index.size(), count);
    std::vector<std::int32_t> positions;
    for (const PageInfo& page : pages(index)) {
      EXPECT_FALSE(page.positions.empty());
      EXPECT_LE(page.positions.size(), kPageSize);
      positions.insert(positions.end(), page.positions.begin(), page.positions.end());
    }
    std::sort(positions.begin(), positions.end());
    std::vector<std::int32_t> expected(count);
    std::iota(expected.begin(), expected.end(), kFirst);
    EXPECT_EQ(positions, expected);
    std::vector<std::byte> keys(count * kDim * size_of(all.dtype)), values(keys.size());
    index.gather(keys.data(), values.data());
    if (GetParam().has_codes()) {
      expect_near(keys, all.raw_keys, all.dtype);
      return expect_near(values, all.raw_values, all.dtype);
    }
    EXPECT_TRUE(std::equal(keys.begin(), keys.end(), all.raw_keys.begin()));
    EXPECT_TRUE(std::equal(values.begin(), values.end(), all.raw_values.begin()));
  }

  // To what eight bits leave of rows: a hundredth of their largest element or so.
  static void expect_near(const std::vector<std::byte>& rows, const std::vector<std::byte>& raw,
                          DType dtype) {
    std::vector<float> got(rows.size() / size_of(dtype)), expected(got.size());
    simd::kernels().to_float(rows.data(), dtype, got.data(), got.size());
    simd::kernels().to_float(raw.data(), dtype, expected.data(), expected.size());
    for (std::size_t first = 0; first < got.size(); first += kDim) {
      const float* row = expected.data() + first;
      float largest = 0.0f;
      for (int i = 0; i < kDim; ++i) largest = std::max(largest, std::abs(row[i]));
      for (int i = 0; i < kDim; ++i) {
        EXPECT_NEAR(got[first + i], row[i], 0.03f * largest) << "token " << first / kDim;
      }
    }
  }

  // The tokens with keys and values as the index holds them.
  static Tokens as_held(const Held& index, Tokens all) {
    for (const Segment& segment : index.segments()) {
      const PageTable& table = segment.index().table();
      const std::span<const std::uint32_t> masks = segment.masks();
      for (int page = 0; page < static_cast<int>(masks.size()); ++page) {
        for (std::uint32_t slots = masks[page]; slots != 0; slots &= slots - 1) {
          const int slot = std::countr_zero(slots);
          const std::ptrdiff_t at = (table.position(page, slot) - kFirst) * std::ptrdiff_t{kDim};
          table.key(page, slot, all.keys.data() + at);
          table.value(page, slot, all.values.data() + at);
        }
      }
    }
    return all;
  }

  struct Answer {
    Selection selection;
    std::vector<float> out, lse;
    bool operator==(const Answer& other) const {
      const Selection& a = selection;
      const Selection& b = other.selection;
      return out == other.out && lse == other.lse && a.tokens == b.tokens && a.logits == b.logits &&
             a.rest_lse == b.rest_lse && a.far_weights == b.far_weights &&
             a.far_share == b.far_share && a.far_total == b.far_total &&
             a.far_shift == b.far_shift &&
             std::equal(a.picks.begin(), a.picks.end(), b.picks.begin(), b.picks.end(),
                        [](const PagePick& x, const PagePick& y) {
                          return x.local_page == y.local_page && x.slots == y.slots;
                        });
    }
  };

  std::vector<PageInfo> pages(const Held& index) {
    std::vector<PageInfo> pages;
    segments_.clear();
    if (index.size() == 0) return pages;
    ask(index, queries(), 8);
    selector_.pages(pages);
    segments_.clear();  // they hold pages
    return pages;
  }

  // A step without sink and window, as HeadCache::decode makes one.
  Answer ask(const Held& index, const std::vector<float>& queries, int budget) {
    const std::vector<float> near(kGroup, -INFINITY);
    SelectRequest request;
    request.queries = queries.data();
    request.group = kGroup;
    request.near_lse = near.data();
    request.budget = request.max_budget = budget;
    std::vector<float> turned(queries.size()), bias(kGroup);
    if (GetParam().has_codes()) {
      format(index.segments().front()).turn(queries.data(), kGroup, turned.data(), bias.data());
      request.turned = turned.data();
      request.bias = bias.data();
    }
    Answer answer;
    Selection& selection = answer.selection;
    segments_ = index.segments();
    std::vector<const Segment*> segments;
    for (const Segment& segment : segments_) segments.push_back(&segment);
    selector_.select(pool_->config, segments, request, selection);
    const auto picked = static_cast<std::size_t>(selection.tokens);
    const std::vector<float> means = node_means();
    const std::size_t nodes = means.size() / kDim;
    EXPECT_EQ(selection.logits.size(), kGroup * picked);
    EXPECT_EQ(selection.far_weights.size(), kGroup * nodes);
    EXPECT_EQ(selection.far_share.size(),
              GetParam().tail == std::string("on") ? kGroup * picked : 0);
    std::vector<float> keys, values;
    picked_rows(selection, keys, values);
    answer.out.assign(kGroup * kDim, 0.0f);
    for (int g = 0; g < kGroup; ++g) {
      const float* logits = selection.logits.data() + g * picked;
      float max = selection.far_total[g] > 0.0f ? selection.far_shift[g] : -INFINITY;
      for (std::size_t t = 0; t < picked; ++t) max = std::max(max, logits[t]);
      const float far_scale =
          selection.far_total[g] > 0.0f ? std::exp(selection.far_shift[g] - max) : 0.0f;
      float total = far_scale * selection.far_total[g];
      float* out = answer.out.data() + g * kDim;
      for (std::size_t t = 0; t < picked; ++t) {
        expect_logit(queries.data() + g * kDim, keys.data() + t * kDim, logits[t]);
        float weight = std::exp(logits[t] - max);
        total += weight;
        if (nodes > 0) weight -= far_scale * selection.far_share[g * picked + t];
        for (int j = 0; j < kDim; ++j) out[j] += weight * values[t * kDim + j];
      }
      for (std::size_t c = 0; c < nodes; ++c) {
        const float weight = far_scale * selection.far_weights[g * nodes + c];
        for (int j = 0; j < kDim; ++j) out[j] += weight * means[c * kDim + j];
      }
      for (int j = 0; j < kDim && total > 0.0f; ++j) out[j] /= total;
      answer.lse.push_back(max + std::log(total));
    }
    return answer;
  }

  // Of the segments that were asked last.
  std::vector<float> node_means() const {
    std::vector<float> means;
    for (const Segment& segment : segments_) {
      if (!segment.index().has_far_field()) continue;
      for (int node = 0; node < segment.index().node_count(); ++node) {
        means.resize(means.size() + kDim);
        simd::kernels().to_float(segment.node_mean(node), GetParam().dtype,
                                 means.data() + means.size() - kDim, kDim);
      }
    }
    return means;
  }

  // Keys and values [T, D] of the picked tokens.
  void picked_rows(const Selection& selection, std::vector<float>& keys,
                   std::vector<float>& values) {
    const std::size_t row = pool_->context.stored_row_bytes();
    keys.resize(static_cast<std::size_t>(selection.tokens) * kDim);
    values.resize(keys.size());
    std::size_t at = 0;
    for (const PagePick& pick : selection.picks) {
      for (std::uint32_t slots = pick.slots; slots != 0; slots &= slots - 1, at += kDim) {
        const std::byte* key = pool_->pool->data(pick.page) + std::countr_zero(slots) * row;
        format(segments_.front()).decode_key(key, keys.data() + at);
        format(segments_.front()).decode_value(key + kPageSize * row, values.data() + at);
      }
    }
  }

  static const RowFormat& format(const Segment& segment) {
    return segment.index().table().format();
  }

  static void expect_logit(const float* query, const float* key, float logit) {
    double exact = 0.0, size = 0.0;
    for (int j = 0; j < kDim; ++j) {
      exact += double{query[j]} * key[j];
      size += std::abs(double{query[j]} * key[j]);
    }
    EXPECT_NEAR(logit, exact, 1e-6 * (1.0 + size));
  }

  std::vector<float> queries(unsigned seed = 9) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.4f);
    std::vector<float> result(kGroup * kDim);
    for (float& x : result) x = normal(random);
    return result;
  }

  static constexpr int kFirst = 4;  // position of the first token; 0..3 would be sinks
  std::unique_ptr<PoolFixture> pool_;
  std::vector<Segment> segments_;
  Selector selector_;
};

}  // namespace icecache::testing
