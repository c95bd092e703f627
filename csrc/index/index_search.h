// What an index may do by itself in place of the Selector: find candidates, or choose whole pages.
#pragma once

#include <any>
#include <cstdint>
#include <vector>

#include "index/selection.h"

namespace icecache {

// Memory of a search, which its caller keeps for the next one: of a type that is the index's own.
class SearchScratch {
 public:
  template <typename T>
  T& as() {
    if (T* kept = std::any_cast<T>(&scratch_)) return *kept;
    return scratch_.emplace<T>();
  }

 private:
  std::any scratch_;
};

class CandidateFinder {
 public:
  struct Found {
    std::vector<std::int32_t> slots;  // slot ids, ascending, each once
    // [G] estimated log weight of all tokens that are not in slots; not asked for with sketches.
    std::vector<float> rest_lse;
    std::int64_t bytes = 0;  // read to find them
  };
  // Candidates beside which there are more tokens than `wanted`; about that many. `found` comes
  // empty, with rest_lse -inf.
  virtual void find(const SelectRequest& request, std::int64_t wanted, SearchScratch& scratch,
                    Found& found) const = 0;

 protected:
  ~CandidateFinder() = default;
};

class PageChooser {
 public:
  // Fills picks, tokens, rest_lse and bytes_scanned.
  virtual void choose_pages(const SelectRequest& request, SearchScratch& scratch,
                            Selection& selection) const = 0;

 protected:
  ~PageChooser() = default;
};

}  // namespace icecache
