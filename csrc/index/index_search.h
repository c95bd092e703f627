// What an index may do by itself in place of the Selector: find candidates, or choose whole pages.
#pragma once

#include <cstdint>
#include <vector>

#include "index/selection.h"

namespace icecache {

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
  virtual void find(const SelectRequest& request, std::int64_t wanted, Found& found) const = 0;

 protected:
  ~CandidateFinder() = default;
};

class PageChooser {
 public:
  // Fills picks, tokens, rest_lse and bytes_scanned.
  virtual void choose_pages(const SelectRequest& request, Selection& selection) const = 0;

 protected:
  ~PageChooser() = default;
};

}  // namespace icecache
