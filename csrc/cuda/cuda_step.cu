#include <algorithm>

#include "cuda/launch.h"
#include "cuda/step.h"
#include "cuda/step_append.h"
#include "cuda/step_append_all.h"
#include "cuda/step_attend.h"
#include "cuda/step_attend_all.h"
#include "cuda/step_pick.h"
#include "cuda/step_rescore.h"
#include "cuda/step_scan.h"
#include "icecache/error.h"

namespace icecache::gpu {
namespace {

// Lays arrays behind each other; without memory it only counts.
class Layout {
 public:
  explicit Layout(std::byte* memory) : memory_(memory) {}
  template <typename T>
  void place(T*& pointer, std::int64_t count, std::size_t size = 0) {
    if constexpr (!std::is_void_v<T>) size = sizeof(T);
    if (memory_ != nullptr) pointer = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += (static_cast<std::size_t>(count) * size + 255) / 256 * 256;
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  std::size_t bytes_ = 0;
};

// visit(array, elements of one pair, bytes of one) for all that a layer keeps.
template <typename Visit>
void for_each_array(const StepShape& s, LayerState& layer, const Visit& visit) {
  const std::size_t row = s.head_dim * size_of(s.dtype);
  const std::int64_t d = s.head_dim, rank = s.rank;
  const auto typed = [&](auto*& array, std::int64_t of_pair) {
    visit(array, of_pair, sizeof(*array));
  };
  typed(layer.lengths, 1);
  visit(layer.row_keys, s.rows(), row);
  visit(layer.row_values, s.rows(), row);
  typed(layer.pages, s.pages());
  typed(layer.open_sum, d);
  visit(layer.recent_queries, std::int64_t{s.group} * kRecentQueries, row);
  typed(layer.mean_key, d);
  typed(layer.from_key, d * rank);
  typed(layer.from_query, d * rank);
  typed(layer.low, rank);
  typed(layer.step, rank);
  typed(layer.owner, s.cached_rows);
  typed(layer.stamp, s.cached_rows);
  typed(layer.has_value, s.cached_rows);
  typed(layer.resident, 1);
  typed(layer.counters, kCounters);
}

// Starts kernels that may begin before the one ahead has ended, where the device has that.
class Starter {
 public:
  explicit Starter(Stream stream) : stream_(stream) {}
  void operator()(const char* name, void (*kernel)(StepParams), dim3 grid, int threads,
                  const StepParams& p, Chain chain = Chain::kBehind) const {
    launch(name, kernel, grid, threads, stream_, p, is_chained_ ? chain : Chain::kNone);
  }

 private:
  Stream stream_;
  bool is_chained_ = can_chain();
};

template <typename T, int D>
void launch_attend_all(const StepParams& p, const Starter& start) {
  const StepShape& s = p.shape;
  start("attend_all",
        s.attend_tiles() == 1 ? attend_all_kernel<T, D, 1> : attend_all_kernel<T, D, 2>,
        dim3(static_cast<unsigned>(s.attend_all_blocks() * p.tokens),
             static_cast<unsigned>(s.pairs()), static_cast<unsigned>(s.attend_groups())),
        kAttendBlock, p);
}

// The kernels of one token of each sequence.
template <typename T, int D>
void launch_chain(const StepParams& p, const Starter& start_with) {
  const StepShape& s = p.shape;
  const auto start = [&](const char* name, void (*kernel)(StepParams), dim3 grid, int threads,
                         Chain chain = Chain::kBehind) {
    start_with(name, kernel, grid, threads, p, chain);
  };
  const auto pairs = static_cast<unsigned>(s.pairs());
  const auto chunked = [&](int resident) {
    return dim3(static_cast<unsigned>(s.blocks_of_pair(resident)), pairs);
  };
  start("append", append_kernel<T, D>, dim3(pairs, 3), kBlock);
  if (s.extents > 0 && p.tokens == 1) launch_attend_all<T, D>(p, start_with);
  const bool wide = s.far_node_tokens == 2 * kWarp;
  start("scan",
        s.words() == 4 ? (wide ? scan_kernel<4, true> : scan_kernel<4, false>)
                       : (wide ? scan_kernel<8, true> : scan_kernel<8, false>),
        chunked(kScanBlocks), kBlock);
  start("rank", rank_kernel, chunked(kRankBlocks), kBlock);
  start("choose", choose_kernel, chunked(kChooseBlocks), kBlock);
  start("resolve", resolve_kernel, dim3(pairs), kPickBlock);
  constexpr int kRescored = kBlock / kWarp * RowShape<T, D>::kRows * kRescoreUnroll;
  start("rescore", rescore_kernel<T, D>, dim3((kMaxCandidates + kRescored - 1) / kRescored, pairs),
        kBlock);
  start("pick", pick_kernel, dim3(pairs), kPickBlock, Chain::kBeside);
  const dim3 blocks(static_cast<unsigned>(s.attend_blocks()), pairs,
                    static_cast<unsigned>(s.attend_groups()));
  start("attend", s.attend_tiles() == 1 ? attend_kernel<T, D, 1> : attend_kernel<T, D, 2>, blocks,
        kAttendBlock, Chain::kBeside);
}

template <typename T, int D>
void launch_with(const StepParams& p, Stream stream) {
  const Starter start(stream);
  if (p.tokens == 1) return launch_chain<T, D>(p, start);
  if (p.shape.extents > 0) {
    start("append_all", append_all_kernel<T, D>, dim3(static_cast<unsigned>(p.shape.pairs()), 2),
          kBlock, p);
    launch_attend_all<T, D>(p, start);
  }
  StepParams of_token = p;
  for (int token = 0; token < p.tokens; ++token) {
    of_token.token = token;
    of_token.rows = p.rows + std::int64_t{token} * p.shape.batch;
    launch_chain<T, D>(of_token, start);
  }
}

template <typename T>
void launch_of(const StepParams& p, Stream stream) {
  with_head_dim(p.shape.head_dim,
                [&](auto head_dim) { launch_with<T, decltype(head_dim)::value>(p, stream); });
}

}  // namespace

void check_shape(const StepShape& s) {
  const auto refuse = [](const char* name, const char* supported, auto got) {
    throw InvalidArgument(message("device=cuda: ", name, " must be ", supported, ", got ", got));
  };
  if (s.head_dim != 64 && s.head_dim != 96 && s.head_dim != 128 && s.head_dim != 256)
    refuse("head_dim", "64, 96, 128 or 256 (run other models on the CPU)", s.head_dim);
  if (s.group < 1 || s.group > kMaxStepGroup)
    refuse("num_q_heads / num_kv_heads", "1..16 (run other models on the CPU)", s.group);
  if (s.rank != 32 && s.rank != 64) refuse("sketch_rank", "32 or 64", s.rank);
  if (s.rank > s.head_dim) refuse("sketch_rank", "at most head_dim", s.rank);
  if (s.far_node_tokens != 32 && s.far_node_tokens != 64)
    refuse("far_node_tokens", "32 or 64", s.far_node_tokens);
  if (s.page_size != 8 && s.page_size != 16 && s.page_size != 32)
    refuse("page_size", "8, 16 or 32", s.page_size);
  if (s.window_tokens < 1 || s.sink_tokens < 0 || s.near_rows() > kMaxNear)
    refuse("sink_tokens + window_tokens", "at most 256, with a window of at least 1",
           s.near_rows());
  if (s.candidates < s.select_tokens || s.candidates > kMaxCandidates)
    refuse("candidates", "at most 512 and at least the tokens picked", s.candidates);
  if (s.select_tokens < 1) refuse("token_budget", "more than sink and window", s.select_tokens);
  if (s.cached_rows < 2 * kMaxCandidates || s.cached_rows > 32767)
    refuse("cached rows of a head (device_pages x page_size)", "1024..32767", s.cached_rows);
  if (s.token_room < 1 || s.token_room % s.far_node_tokens != 0 || s.token_room % s.page_size != 0)
    refuse("token room", "a multiple of far_node_tokens and page_size", s.token_room);
  if (s.batch < 1 || s.kv_heads < 1) refuse("batch x num_kv_heads", "positive", s.pairs());
  if (s.pairs() > 65535) refuse("batch x num_kv_heads", "at most 65535", s.pairs());
}

void launch_step(const StepParams& params, Stream stream) {
  switch (params.shape.dtype) {
    case DType::kFloat32:
      return launch_of<float>(params, stream);
    case DType::kBFloat16:
      return launch_of<BFloat16>(params, stream);
    case DType::kFloat16:
      return launch_of<Float16>(params, stream);
    case DType::kInt8:  // of pages on the host alone
      return;
  }
}

std::size_t place(const StepShape& s, std::byte* memory, LayerState& layer) {
  Layout layout(memory);
  for_each_array(s, layer, [&](auto*& array, std::int64_t of_pair, std::size_t size) {
    layout.place(array, s.pairs() * of_pair, size);
  });
  return layout.bytes();
}

std::size_t place_shared(const StepShape& s, std::byte* memory, LayerState& layer) {
  Layout layout(memory);
  layout.place(layer.chunks, std::int64_t{s.pairs()} * s.chunks());
  layout.place(layer.room, s.pairs());
  layout.place(layer.extents, std::int64_t{s.pairs()} * s.extents);
  layout.place(layer.extent_room, s.pairs());
  return layout.bytes();
}

void copy_pairs(const StepShape& s, const LayerState& layer, std::int64_t from, std::int64_t to,
                Stream stream) {
  LayerState arrays = layer;
  for_each_array(s, arrays, [&](auto*& array, std::int64_t of_pair, std::size_t size) {
    auto* bytes = reinterpret_cast<std::byte*>(array);
    const std::size_t pair = static_cast<std::size_t>(of_pair) * size;
    copy_on_device(bytes + to * static_cast<std::int64_t>(pair),
                   bytes + from * static_cast<std::int64_t>(pair), pair * s.kv_heads, stream);
  });
}

std::size_t place(const StepShape& s, std::byte* memory, StepScratch& scratch) {
  Layout layout(memory);
  const std::int64_t pairs = s.pairs(), heads = s.padded_group();
  const std::int64_t tokens = s.extents > 0 ? kMaxStepTokens : 1;
  layout.place(scratch.inputs, tokens * pairs);
  layout.place(scratch.lengths, pairs);
  layout.place(scratch.resident_lengths, tokens * pairs);
  layout.place(scratch.taken, pairs);
  layout.place(scratch.query_codes, pairs * heads * s.rank);
  layout.place(scratch.unit, pairs);
  layout.place(scratch.bias, pairs * heads);
  layout.place(scratch.near_logits, pairs * s.near_rows() * heads);
  layout.place(scratch.near_lse, pairs * heads);
  layout.place(scratch.scores, pairs * heads * s.token_room);
  layout.place(scratch.ranks, pairs * s.token_room);
  layout.place(scratch.chunk_max, pairs * s.chunks() * heads);
  layout.place(scratch.chunk_sum, pairs * s.chunks() * heads);
  layout.place(scratch.lse, pairs * heads);
  layout.place(scratch.histogram, pairs * kRanks);
  layout.place(scratch.blocks_ranked, pairs);
  layout.place(scratch.last_rank, pairs);
  layout.place(scratch.found, pairs);
  layout.place(scratch.tokens, pairs * kMaxCandidates);
  layout.place(scratch.token_rows, pairs * kMaxCandidates);
  layout.place(scratch.logits, pairs * kMaxCandidates * heads);
  layout.place(scratch.mass, pairs * s.nodes() * heads);
  layout.place(scratch.entry_count, pairs);
  layout.place(scratch.entry_rows, pairs * s.entries());
  layout.place(scratch.entry_sources, pairs * s.entries());
  layout.place(scratch.entry_weights, pairs * s.entries() * heads);
  layout.place(scratch.far_scale, pairs * heads);
  layout.place(scratch.partial, s.partial_sums() * heads * s.head_dim);
  layout.place(scratch.partial_sum, s.partial_sums() * heads);
  layout.place(scratch.partial_max, s.partial_sums() * heads);
  layout.place(scratch.blocks_done, tokens * pairs);
  return layout.bytes();
}

}  // namespace icecache::gpu
