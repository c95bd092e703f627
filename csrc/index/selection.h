// One step's question to the index of a head, and the answer.
#pragma once

#include <cstdint>
#include <vector>

#include "pages/tokens.h"

namespace icecache {

// Logits must be ordinary floats: |q.k| up to 2^30 or so. Logarithms of weights, here and in
// Selection, are floats: they rank and estimate, to a logit's rounding. What is attended exactly is
// weighed by its logits alone.
struct SelectRequest {
  const float* queries = nullptr;  // [G, D], already multiplied by the softmax scale
  // Where rows of pages have codes, the queries as RowFormat::turn() makes them: [G, D], [G]. Null:
  // `queries`, as they are.
  const float* turned = nullptr;
  const float* bias = nullptr;
  int group = 0;                    // G
  float logit_softcap = 0.0f;       // of all logits, estimated ones too; 0: none
  const float* near_lse = nullptr;  // [G] log weight of sink + window, -inf where there is none
  int budget = 0;                   // tokens to pick at most (sink and window already deducted)
  int max_budget = 0;               // with mass_target; >= budget
  double mass_target = 0.0;         // 0: off

  const float* for_rows() const { return turned != nullptr ? turned : queries; }
};

// The answer to one step. Weights of the far field are relative to exp(far_shift[g]).
struct Selection {
  std::vector<PagePick> picks;     // ascending local_page, each page once
  int tokens = 0;                  // T: picked tokens, over all pages
  std::vector<float> logits;       // [G, T] of the picked tokens, by page and slot
  std::vector<float> rest_lse;     // [G] estimated log weight of the index's tokens not picked
  std::int64_t bytes_scanned = 0;  // sketches, candidate keys read by this call
  // Whether there were more candidates than at first, since one that was none might have been a
  // main token of some head; and whether, with as many as there may be, one still might.
  bool is_widened = false, is_doubtful = false;

  // Where the far field is on, tokens not picked contribute sum over nodes c of far_weights[g, c]
  // times the mean value of c's tokens (picked ones included), less far_share[g, t] times the value
  // of each picked token t; they weigh far_total[g]. Else all zero and empty.
  std::vector<float> far_weights;           // [G, C]
  std::vector<float> far_share;             // [G, T]
  std::vector<float> far_total, far_shift;  // [G]
};

}  // namespace icecache
