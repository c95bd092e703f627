#include "compared/faiss_search.h"

#include <faiss/Clustering.h>
#include <faiss/IndexFlat.h>
#include <faiss/IndexHNSW.h>
#include <faiss/IndexIVFFlat.h>
#include <faiss/impl/FaissException.h>
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "icecache/error.h"
#include "icecache/types.h"
#include "index/magnitude.h"

namespace icecache {
namespace {

// FAISS orders parallel sums and insertions by timing.
class OneThread {
 public:
  OneThread() : before_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

template <typename Call>
auto guarded(Call&& call) {
  const OneThread one;
  try {
    return call();
  } catch (const faiss::FaissException& error) {
    throw Error(message("FAISS: ", error.what()));
  }
}

constexpr int kCellIterations = 10;
constexpr int kHnswNeighbours = 32;

}  // namespace

std::shared_ptr<faiss::Index> FaissSearch::make(const float* keys, std::int64_t count) const {
  std::shared_ptr<faiss::Index> index;
  if (kind_ == "ivf") {
    const auto lists = std::max<std::int64_t>(
        1, std::min<std::int64_t>(count, std::lround(2.0 * std::sqrt(count))));
    auto coarse = std::make_unique<faiss::IndexFlatIP>(head_dim_);
    auto ivf = std::make_shared<faiss::IndexIVFFlat>(coarse.get(), head_dim_, lists,
                                                     faiss::METRIC_INNER_PRODUCT);
    ivf->own_fields = true;
    coarse.release();
    ivf->cp.min_points_per_centroid = 1;
    ivf->train(count, keys);
    index = ivf;
  } else if (kind_ == "hnsw") {
    auto hnsw = std::make_shared<faiss::IndexHNSWFlat>(head_dim_, kHnswNeighbours,
                                                       faiss::METRIC_INNER_PRODUCT);
    hnsw->hnsw.efConstruction = 2 * kHnswNeighbours;
    index = hnsw;
  } else {
    index = std::make_shared<faiss::IndexFlatIP>(head_dim_);
  }
  index->add(count, keys);
  return index;
}

void FaissSearch::build(const float* keys, std::span<const std::int32_t> slots) {
  const auto count = static_cast<std::int64_t>(slots.size());
  std::vector<float> scaled(keys, keys + count * head_dim_);
  exponent_ = far_exponent(largest_of(keys, count * head_dim_));
  for (std::int64_t i = 0; i < count; ++i) scale(keys + i * head_dim_, &scaled[i * head_dim_]);
  index_ = guarded([&] { return make(scaled.data(), count); });
  slots_.assign(slots.begin(), slots.end());
}

// Products of keys scaled by one factor rank alike.
void FaissSearch::scale(const float* key, float* out) const {
  for (int i = 0; i < head_dim_; ++i) {
    const float x = exponent_ == 0 ? key[i] : std::ldexp(key[i], -exponent_);
    out[i] = std::clamp(x, -kFarthest, kFarthest);
  }
}

std::int64_t FaissSearch::search(const float* queries, int n, std::int64_t k,
                                 std::vector<std::int32_t>& slots) const {
  const auto all = static_cast<std::int64_t>(slots_.size());
  const std::int64_t wanted = std::min(all, k);
  std::vector<float> products(static_cast<std::size_t>(n) * wanted);
  std::vector<faiss::Index::idx_t> numbers(products.size());
  const auto run = [&](const faiss::SearchParameters* parameters) {
    index_->search(n, queries, wanted, products.data(), numbers.data(), parameters);
  };
  std::int64_t compared = all;
  guarded([&] {
    if (kind_ == "flat") {
      run(nullptr);
    } else if (kind_ == "hnsw") {
      faiss::SearchParametersHNSW wide;
      wide.efSearch = static_cast<int>(std::max<std::int64_t>(64, wanted));
      run(&wide);
      compared = 2 * wanted;
    } else {
      // An eighth of the lists; more where those hold too few keys.
      const std::size_t lists = static_cast<const faiss::IndexIVF&>(*index_).nlist;
      faiss::SearchParametersIVF probes;
      probes.nprobe = std::max<std::size_t>(1, lists / 8);
      run(&probes);
      while (probes.nprobe < lists &&
             std::find(numbers.begin(), numbers.end(), -1) != numbers.end()) {
        probes.nprobe = std::min(lists, 2 * probes.nprobe);
        run(&probes);
      }
      compared = all * static_cast<std::int64_t>(probes.nprobe) / static_cast<std::int64_t>(lists);
    }
  });
  for (const std::int64_t number : numbers) {
    if (number >= 0) slots.push_back(slots_[number]);
  }
  return n * compared * head_dim_ * static_cast<std::int64_t>(sizeof(float));
}

std::size_t FaissSearch::memory_bytes() const {
  const std::size_t graph = kind_ == "hnsw" ? 2 * kHnswNeighbours * sizeof(std::int32_t) : 0;
  return slots_.size() * (head_dim_ * sizeof(float) + graph + sizeof(std::int32_t));
}

std::vector<std::int32_t> faiss_cells(const float* keys, std::int64_t count, int head_dim,
                                      std::int64_t cells, std::int64_t seed) {
  // Distances of scaled keys are numbers.
  std::vector<float> scaled(keys, keys + count * head_dim);
  const int exponent = far_exponent(largest_of(keys, count * head_dim));
  if (exponent != 0) scale_by(scaled.data(), count * head_dim, -exponent);
  return guarded([&] {
    faiss::ClusteringParameters parameters;
    parameters.niter = kCellIterations;
    parameters.seed = static_cast<int>(seed) + 1;
    parameters.min_points_per_centroid = 1;  // fewer is what FAISS warns about on stderr
    faiss::Clustering clustering(head_dim, static_cast<int>(cells), parameters);
    faiss::IndexFlatL2 centres(head_dim);
    clustering.train(count, scaled.data(), centres);
    std::vector<faiss::Index::idx_t> labels(count);
    std::vector<float> distances(count);
    centres.search(count, scaled.data(), 1, distances.data(), labels.data());
    return std::vector<std::int32_t>(labels.begin(), labels.end());
  });
}

}  // namespace icecache
