// What a prompt leaves on the device and in host memory: window, sketches, far-field means, pages.
//
//   sample       keys, values and queries that shape the space of tokens, as fp32, for the host
//   (host)       that space for each head: three eigenproblems of D x D, on a CPU thread
//   coordinates  all tokens in that space (index/token_space.h), and the range of each coordinate
//   order        balanced bisection along principal directions (index/bisect.h), level by level: a
//                direction for each part, then one sort of (head, part, projection)
//   lay_out      codes, means of nodes and host pages in that order; sink and window rows
//
// All heads of one (sequence, layer) at once. Deterministic.
#pragma once

#include <vector>

#include "cuda/step.h"

namespace icecache::gpu {

constexpr int kMaxSampledKeys = 4096;  // of a head
constexpr int kMaxQueries = 512;       // rows of the group's queries
constexpr int kValueRank = 32;         // V: coordinates of a value, one for each lane of a warp

struct BuildParams {
  StepShape shape;
  LayerState layer;
  int first_pair = 0;          // b * Hkv
  int length = 0;              // T, tokens of the prompt
  int first = 0;               // the first token that shapes metric and ranges: its sinks do not
  int indexed = 0;             // tokens that go to pages, from sink_tokens on
  const void* keys = nullptr;  // [Hkv, T, D]
  const void* values = nullptr;
  const void* queries = nullptr;  // [Hq, T', D]: the last T' queries of the prompt
  std::int64_t key_head = 0, key_token = 0, value_head = 0, value_token = 0;  // strides, elements
  std::int64_t query_head = 0, query_token = 0;
  int query_tokens = 0;  // T'
  int key_samples = 0;   // of a head, and as many values
  int query_samples = 0;
  bool is_fitted =
      true;  // else the space is the same for all heads, and the order that of position
  constexpr int width() const { return shape.rank + (shape.tail ? kValueRank : 0); }

  float* sampled_keys = nullptr;     // [Hkv, key_samples, D]
  float* sampled_values = nullptr;   // [Hkv, key_samples, D]
  float* sampled_queries = nullptr;  // [Hkv, query_samples, D]
  float* from_value = nullptr;       // [Hkv, D, V]
  float* coordinates = nullptr;      // [Hkv, T - first, width]
  std::uint32_t* range = nullptr;    // [Hkv, R, 2] smallest and largest, as ordered integers
  std::int32_t* order = nullptr;     // [Hkv, indexed] index tokens (0: the first after the sinks)
  std::int32_t* segments = nullptr;  // [segment_count + 1] bounds within 0..indexed
  int segment_count = 0;
  float* directions = nullptr;              // [Hkv, segment_count, width]
  unsigned long long* sort_keys = nullptr;  // [Hkv, indexed]
};

void launch_sample(const BuildParams& params, Stream stream);
void launch_coordinates(const BuildParams& params, Stream stream);
void launch_order_start(const BuildParams& params, Stream stream);  // order = 0, 1, ...
// Directions and sort keys of one level.
void launch_level(const BuildParams& params, Stream stream);
void launch_lay_out(const BuildParams& params, Stream stream);
// Sorts n (key, value) pairs by key, stably; the result is in keys_out and values_out. `room`: see
// sort_room().
std::size_t sort_room(std::int64_t n);
void sort_pairs(void* room, std::size_t room_bytes, const unsigned long long* keys,
                unsigned long long* keys_out, const std::int32_t* values, std::int32_t* values_out,
                std::int64_t n, int key_bits, Stream stream);

// Bounds of the segments of each level, from the whole [0, n] down to nodes of node_tokens: the
// splits of index/bisect.h.
std::vector<std::vector<std::int32_t>> bisection_levels(int n, int node_tokens);

}  // namespace icecache::gpu
