// HeadStats: what the decode steps of one layer and KV head did.
#pragma once

#include <algorithm>
#include <cstdint>

namespace icecache {

// Sums over all sequences, of an Engine since its start (or reset_stats), of a DeviceCache since it
// was made. Each counts what it has: a DeviceCache the steps and what moves to the device, and it
// does not estimate the mass, which is NaN there.
struct HeadStats {
  // Decode queries within the budget; of an Engine those of calls with up to decode_tokens tokens.
  std::int64_t steps = 0;
  std::int64_t dense_steps = 0;  // decode queries that attended to everything
  // Tokens of prompts that attended, and those of them that attended within prefill_budget.
  std::int64_t prompt_tokens = 0, sparse_prompt_tokens = 0;
  std::int64_t tokens_selected = 0;  // by the index, sink and window not counted
  std::int64_t pages_selected = 0;
  // Steps with more candidates than at first, lest a main token of a head be missed; and those
  // where one may have been all the same.
  std::int64_t widened_steps = 0, doubtful_steps = 0;
  std::int64_t seals = 0, merges = 0;  // segments built of decoded tokens, of other segments
  std::int64_t bytes_read = 0;         // sketches, summaries, candidates, attended K and V
  std::int64_t hits = 0, misses = 0;   // candidates whose key was on the device, in host memory
  std::int64_t bytes_moved = 0;        // keys and values, host to device
  double mass = 0.0;  // sum over steps of the exactly attended share, mean over the group
  double worst_mass = 1.0;
  double select_seconds = 0.0, attend_seconds = 0.0, index_seconds = 0.0;

  HeadStats& operator+=(const HeadStats& other) {
    for (const auto field :
         {&HeadStats::steps, &HeadStats::dense_steps, &HeadStats::prompt_tokens,
          &HeadStats::sparse_prompt_tokens, &HeadStats::tokens_selected, &HeadStats::pages_selected,
          &HeadStats::widened_steps, &HeadStats::doubtful_steps, &HeadStats::seals,
          &HeadStats::merges, &HeadStats::bytes_read, &HeadStats::hits, &HeadStats::misses,
          &HeadStats::bytes_moved}) {
      this->*field += other.*field;
    }
    for (const auto field : {&HeadStats::mass, &HeadStats::select_seconds,
                             &HeadStats::attend_seconds, &HeadStats::index_seconds}) {
      this->*field += other.*field;
    }
    worst_mass = std::min(worst_mass, other.worst_mass);
    return *this;
  }
};

}  // namespace icecache
