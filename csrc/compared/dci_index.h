// DciIndex (index = "dci"): the structure of the IceCache paper, kept for comparison.
//
// The cells of a DciTree, their tokens ordered along one random direction (of the plain keys, drawn
// from `seed`) and cut into pages. For each query head a beam search in the tree finds cells; the
// keys of their tokens are scored exactly.
//   select = "page": each head ranks the pages of its cells by their best member; the group's lists
//   are interleaved (rank by rank, head by head) and every page that is new and fits the budget is
//   taken. select = "token": the best `candidates` tokens of each head go into the common pick.
// Tokens outside a head's cells are estimated by tokens x exp(q.representative) over the nodes that
// its search dropped.
//
// A new token joins the page of its cell that its projection falls into; a full page gives its
// upper half to a new one. Every e-th token (DciTree) opens a cell and a page of its own.
#pragma once

#include <bitset>
#include <memory>
#include <optional>
#include <vector>

#include "compared/dci_tree.h"
#include "compared/page_cells.h"
#include "index/growing_index.h"

namespace icecache {

class DciIndex final : public GrowingIndex, CandidateFinder, PageChooser, PageSplitter {
 public:
  explicit DciIndex(const HeadContext& context);
  std::unique_ptr<GrowingIndex> fork() const override;
  const CandidateFinder* finder() const override { return this; }
  const PageChooser* chooser() const override { return config().select == "page" ? this : nullptr; }
  std::size_t memory_bytes() const override;
  void check_integrity() const override;

 protected:
  Arrangement arrange(const Rows& rows) override;
  void built() override;
  int choose_page(const float* key) override;
  PageSplitter* splitter() override { return this; }
  void page_opened(int page) override;
  void token_added(int page) override;
  void tokens_removed(int page) override;

 private:
  // The pages that any head's search reached, with exact logits for all heads.
  using Heads = std::bitset<kMaxGroup>;
  struct Scan {
    std::vector<std::int32_t> pages;  // ascending
    std::vector<Heads> heads;         // [pages] those that found the page's cell
    std::vector<float> logits;        // [pages, G, S]; -inf for slots not in use
    float unseen_lse[kMaxGroup];
    std::int64_t bytes = 0;
    std::vector<Heads> heads_of_cell;  // [cells] those that found it
  };

  struct Scratch;

  DciIndex(const DciIndex&) = default;
  void find(const SelectRequest& request, std::int64_t wanted, SearchScratch& scratch,
            Found& found) const override;
  void choose_pages(const SelectRequest& request, SearchScratch& scratch,
                    Selection& selection) const override;
  std::uint32_t upper_half(int page) const override;
  void page_split(int page, int other) override;
  std::int64_t beam() const;
  float project(const float* key) const;
  // Into scratch.scan.
  void scan(const SelectRequest& request, std::int64_t wanted, Scratch& scratch) const;

  DciTree tree_;
  PageCells cells_;
  std::vector<float> direction_;           // [D]
  std::vector<std::int32_t> page_tokens_;  // [P] as counted in the tree
  // What arrange() leaves for built(): the tree, and of each page its cell and start.
  struct Pending {
    DciTree tree;
    std::vector<int> cells;
    std::vector<float> starts;
  };
  std::optional<Pending> pending_;
};

// Cells of an index that is built over `tokens` tokens.
std::size_t dci_cells(const Config& config, std::int32_t tokens);

}  // namespace icecache
