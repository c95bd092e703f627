#include "index/semantic_index.h"

#include <algorithm>
#include <cassert>

#include "icecache/error.h"
#include "simd/kernels.h"

namespace icecache {

SemanticIndex::SemanticIndex(const HeadContext& context, bool has_far_field)
    : context_(context),
      table_(context),
      sketch_(static_cast<int>(context.config->sketch_rank),
              static_cast<int>(context.config->sketch_bits),
              static_cast<int>(context.config->page_size)),
      far_(context.head_dim, context.dtype),
      has_far_field_(has_far_field) {}

int SemanticIndex::node_pages() const {
  return static_cast<int>(node_tokens(config()) / static_cast<std::size_t>(config().page_size));
}

void SemanticIndex::build(const TokenBlock& tokens, const QueryMoments& queries) {
  const int d = context_.head_dim;
  assert(tokens.format == nullptr || !tokens.format->has_codes() || only_holds() ||
         tokens.key_numbers != nullptr);
  std::vector<float> converted;
  const float* keys = tokens.key_numbers;
  const void* values = keys == nullptr ? static_cast<const void*>(tokens.values)
                                       : static_cast<const void*>(tokens.value_numbers);
  const DType value_type = keys == nullptr ? context_.dtype : DType::kFloat32;
  if (keys == nullptr && !only_holds()) {
    converted.resize(static_cast<std::size_t>(tokens.count) * d);
    simd::kernels().to_float(tokens.keys, context_.dtype, converted.data(), converted.size());
    keys = converted.data();
  }
  std::vector<float> coordinates;
  if (has_sketches()) {
    space_ = TokenSpace::fit(keys, values, value_type, tokens.count, d, queries,
                             static_cast<int>(config().sketch_rank),
                             TokenSpace::value_rank_of(config(), d));
    coordinates.resize(static_cast<std::size_t>(tokens.count) * space_.width());
    space_.coordinates(keys, values, value_type, tokens.count, coordinates.data());
    sketch_.fit(coordinates.data(), tokens.count, space_.width());
  }
  const Arrangement arrangement =
      arrange({keys, has_sketches() ? coordinates.data() : nullptr, tokens.count});
  table_.add_pages(tokens, arrangement.order, arrangement.bounds);
  first_position_ = tokens.first_position;
  end_position_ = tokens.first_position + tokens.count;

  if (has_sketches()) {
    sketch_.resize(table_.page_count());
    for (int p = 0; p < table_.page_count(); ++p) {
      for (int i = arrangement.bounds[p]; i < arrangement.bounds[p + 1]; ++i) {
        sketch_.write(
            p, i - arrangement.bounds[p],
            coordinates.data() + static_cast<std::size_t>(arrangement.order[i]) * space_.width());
      }
    }
  }
  node_of_page_.assign(arrangement.nodes.begin(), arrangement.nodes.end());
  node_count_ = 1 + *std::max_element(node_of_page_.begin(), node_of_page_.end());
  if (has_far_field_) {
    far_.reserve(node_count_);
    const std::vector<std::vector<int>> by_node = pages_by_node();
    for (const std::vector<int>& pages : by_node) far_.assign(far_.add_node(), table_, pages);
    if (config().prefill_budget > 0)
      node_keys_ = NodeKeys(table_, sketch_, space_.metric.rank, by_node);
  }
  built();
}

void SemanticIndex::built() {
  far_.finish();
  space_.metric.from_key = std::vector<float>();
  space_.from_value = std::vector<float>();
}

std::vector<std::vector<int>> SemanticIndex::pages_by_node() const {
  std::vector<std::vector<int>> pages(node_count_);
  for (int page = 0; page < table_.page_count(); ++page) {
    if (table_.in_use(page)) pages[node_of_page_[page]].push_back(page);
  }
  return pages;
}

std::size_t SemanticIndex::memory_bytes() const {
  return table_.memory_bytes() + sketch_.memory_bytes() + far_.memory_bytes() +
         node_keys_.memory_bytes() +
         (space_.metric.from_key.capacity() + space_.metric.from_query.capacity() +
          space_.metric.mean.capacity() + space_.from_value.capacity()) *
             sizeof(float) +
         node_of_page_.capacity() * sizeof(int);
}

void SemanticIndex::check_integrity() const {
  table_.check_integrity();
  for (int page = 0; page < table_.page_count(); ++page) {
    if (!table_.in_use(page)) continue;
    if (node_of_page_[page] < 0 || node_of_page_[page] >= node_count_)
      throw IntegrityError(message("page ", page, " is in no node"));
    for (const std::int32_t position : table_.positions_of(page)) {
      if (position >= 0 && (position < first_position_ || position >= end_position_))
        throw IntegrityError(message("page ", page, " has position ", position, " beside ",
                                     first_position_, " to ", end_position_));
    }
  }
  if (size() != end_position_ - first_position_)
    throw IntegrityError(message("index holds ", size(), " tokens at positions ", first_position_,
                                 " to ", end_position_));
  if (!has_far_field_) return;
  const std::vector<std::vector<int>> pages = pages_by_node();
  for (int node = 0; node < node_count_; ++node) far_.check_node(node, table_, pages[node]);
}

}  // namespace icecache
