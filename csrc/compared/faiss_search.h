// FaissSearch: an inner-product index of FAISS over the keys of one SemanticIndex, and which slot
// holds which key.
//
// FAISS's errors are thrown as Error; it runs on the calling thread alone, so that results do not
// depend on timing.
//
// Threads: const methods any number, others one caller.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace faiss {
struct Index;
}

namespace icecache {

class FaissSearch {
 public:
  // kind: "flat", "ivf" or "hnsw".
  FaissSearch(const std::string& kind, int head_dim) : kind_(kind), head_dim_(head_dim) {}

  // Keys [slots.size(), D], key i being in slots[i]. Called once.
  void build(const float* keys, std::span<const std::int32_t> slots);
  // Adds to `slots` those of (about) the k largest q.k of each query [n, D]. Returns the bytes of
  // keys compared.
  std::int64_t search(const float* queries, int n, std::int64_t k,
                      std::vector<std::int32_t>& slots) const;

  std::size_t memory_bytes() const;

 private:
  std::shared_ptr<faiss::Index> make(const float* keys, std::int64_t count) const;

  // What the index holds of a key [D].
  void scale(const float* key, float* out) const;

  std::string kind_;
  int head_dim_;
  int exponent_ = 0;  // keys are held times 2^-exponent
  std::shared_ptr<faiss::Index> index_;
  std::vector<std::int32_t> slots_;  // of each key
};

// Cell of each key [N, D] by k-means with `cells` centres; runs on the calling thread alone.
std::vector<std::int32_t> faiss_cells(const float* keys, std::int64_t count, int head_dim,
                                      std::int64_t cells, std::int64_t seed);

}  // namespace icecache
