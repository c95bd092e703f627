// The index of one head (index = "tree"): build, select of one step. 4 query heads, budget 256,
// bfloat16 and float32.
#include <benchmark/benchmark.h>

#include <cmath>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "host/make_index.h"
#include "icecache/config.h"
#include "index/selector.h"
#include "operands.h"
#include "pages/page_pool.h"
#include "registry.h"
#include "roof.h"
#include "simd/kernels.h"

namespace icecache::bench::tree_index_bench {
namespace {

constexpr int kGroup = 4, kBudget = 220;  // 256 less sinks and window
constexpr int kQueries = 64;              // steps before a query comes again

struct Shape {
  DType dtype;
  int head_dim;
  int tokens;
};

// Rows [n, D] around a few dozen centres, as attention keys are.
std::vector<float> clustered(int n, int head_dim, unsigned seed) {
  constexpr int kCentres = 64;
  const std::vector<float> centres = normal(kCentres * head_dim, 1.5f, 16);
  std::vector<float> rows = normal(static_cast<std::size_t>(n) * head_dim, 0.5f, seed);
  std::mt19937 random(seed);
  for (int i = 0; i < n; ++i) {
    const auto centre = static_cast<int>(random() % kCentres);
    for (int d = 0; d < head_dim; ++d) rows[i * head_dim + d] += centres[centre * head_dim + d];
  }
  return rows;
}

// Tokens of one head, the queries seen, and the pool for an index over them.
class Head {
 public:
  explicit Head(const Shape& shape) : shape_(shape) {
    const int n = shape.tokens;
    row_bytes_ = shape.head_dim * size_of(shape.dtype);
    const std::vector<float> keys = clustered(n, shape.head_dim, 17);
    keys_.resize(n * row_bytes_);
    values_.resize(n * row_bytes_);
    simd::kernels().from_float(keys.data(), keys_.data(), shape.dtype, keys.size());
    fill_normal(values_.data(), static_cast<std::int64_t>(values_.size()), shape.dtype, 18);

    CacheShape cache;
    cache.num_layers = 1;
    cache.num_q_heads = kGroup;
    cache.num_kv_heads = 1;
    cache.head_dim = shape.head_dim;
    cache.dtype = shape.dtype;
    config_ = Config().resolved(cache);

    PagePool::Options options;
    options.page_bytes = 2 * config_.page_size * row_bytes_;
    options.capacity_bytes = std::size_t{64} << 30;  // taken as it is needed
    pool_ = std::make_unique<PagePool>(options);
    context_.pool = pool_.get();
    context_.owner = {0, 0, 0};
    context_.config = &config_;
    context_.head_dim = shape.head_dim;
    context_.group = kGroup;
    context_.dtype = shape.dtype;
    context_.scale = cache.softmax_scale();

    const std::vector<float> recent = clustered(256 * kGroup, shape.head_dim, 19);
    moments_.observe(recent.data(), 256 * kGroup, shape.head_dim);
    queries_ = clustered(kQueries * kGroup, shape.head_dim, 20);
    for (float& x : queries_) x *= context_.scale;
  }

  TokenBlock tokens(int first, int count) const {
    return {keys_.data() + first * row_bytes_, values_.data() + first * row_bytes_, count, first};
  }
  std::unique_ptr<SemanticIndex> built() const {
    std::unique_ptr<SemanticIndex> index = make_index(context_);
    index->build(tokens(0, shape_.tokens), moments_);
    return index;
  }
  SelectRequest request(std::size_t query) const {
    static const std::vector<float> none(kGroup, -std::numeric_limits<float>::infinity());
    SelectRequest request;
    request.queries = queries_.data() + query * kGroup * shape_.head_dim;
    request.group = kGroup;
    request.near_lse = none.data();
    request.budget = request.max_budget = kBudget;
    return request;
  }
  const Config& config() const { return config_; }
  const Shape& shape() const { return shape_; }

 private:
  Shape shape_;
  std::size_t row_bytes_ = 0;
  std::vector<std::byte> keys_, values_;
  Config config_;
  std::unique_ptr<PagePool> pool_;
  HeadContext context_;
  QueryMoments moments_;
  std::vector<float> queries_;
};

// Enough copies of one index that each has left the caches when its turn comes again, as the other
// layers' work makes it.
struct Layers {
  explicit Layers(const Shape& shape) : head(shape) {
    indexes.push_back(head.built());
    const auto own = static_cast<std::int64_t>(indexes[0]->memory_bytes());
    const std::int64_t count = std::max<std::int64_t>(working_set(Home::kMemory) / own / 2, 1);
    while (static_cast<std::int64_t>(indexes.size()) < count) indexes.push_back(head.built());
  }
  Head head;
  std::vector<std::unique_ptr<SemanticIndex>> indexes;
};

void build(benchmark::State& state, Head& head) {
  for (auto _ : state) benchmark::DoNotOptimize(head.built());
  state.counters["tokens_per_second"] =
      benchmark::Counter(head.shape().tokens, benchmark::Counter::kIsIterationInvariantRate);
}

void select(benchmark::State& state, Layers& layers) {
  Cycle cycle(layers.indexes.size()), queries(kQueries);
  Selector selector;
  Selection selection;
  double bytes = 0.0;
  for (auto _ : state) {
    const Segment segment(*layers.indexes[cycle.next()]);
    const Segment* const segments[] = {&segment};
    selector.select(layers.head.config(), segments, layers.head.request(queries.next()), selection);
    bytes += static_cast<double>(selection.bytes_scanned);
  }
  report(state, {bytes / static_cast<double>(state.iterations())});
}

std::string title(const char* name, const Shape& shape) {
  return std::string(name) + "/" + std::string(icecache::name_of(shape.dtype)) +
         "/D:" + std::to_string(shape.head_dim) + "/tokens:" + std::to_string(shape.tokens);
}

const bool registered = [] {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int head_dim : {64, 128}) {
      for (const int tokens : {4096, 32768}) {
        const Shape shape{dtype, head_dim, tokens};
        const auto head = [=] { return std::make_shared<Head>(shape); };
        const auto layers = [=] { return std::make_shared<Layers>(shape); };
        add(title("tree_build", shape), head, build)->Unit(benchmark::kMillisecond);
        add(title("tree_select", shape), layers, select)->Unit(benchmark::kMicrosecond);
      }
    }
  }
  return true;
}();

}  // namespace
}  // namespace icecache::bench::tree_index_bench
