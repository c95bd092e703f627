// HeadCache: a prompt within prefill_budget.
//
// The idea is that of block-sparse prefill (MInference, Jiang et al. 2024), with blocks that pick
// single tokens by sketches, and a far field for what they do not pick.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "host/head_cache.h"
#include "host/layer_update.h"
#include "host/make_index.h"
#include "index/magnitude.h"
#include "simd/kernels.h"

namespace icecache {
namespace {

// Tokens before a block that it attends to whatever it picks.
constexpr std::int32_t kPromptWindow = 256;
// Times prefill_budget: with fewer tokens to pick of, a block attends to all of them.
constexpr std::int64_t kLeastChoice = 4;

// Nats that the spread of a node's keys adds at most: what is left of a node once its best tokens are
// picked is less spread than all of it.
constexpr float kMostSpread = 1.0f;

std::int32_t round_down(std::int32_t position, std::int32_t unit) {
  return position / unit * unit;
}

}  // namespace

// The first one is so large that it is worth to pick of.
std::int32_t HeadCache::chunk_end(int number) const {
  const Config& config = *context_.config;
  const std::int64_t chunk = config.prefill_chunk;
  const std::int64_t first =
      has_index() ? chunk : std::max(chunk, kLeastChoice * config.prefill_budget);
  return static_cast<std::int32_t>(std::min<std::int64_t>(
      tail_.first_position() + first + number * chunk, std::numeric_limits<std::int32_t>::max()));
}

std::int32_t HeadCache::seen_from(std::int32_t end_position) {
  const std::int64_t from = std::int64_t{end_position} + kPromptWindow + kPromptBlock - 1;
  return static_cast<std::int32_t>(std::min<std::int64_t>(
      from / kPromptBlock * kPromptBlock, std::numeric_limits<std::int32_t>::max()));
}

int HeadCache::due_chunks(std::int32_t length) const {
  int chunks = 0;
  while (picks_in_prompts() && seen_from(chunk_end(chunks)) <= length) ++chunks;
  return chunks;
}

std::size_t HeadCache::pages_for_chunks(int count) const {
  std::size_t pages = 0;
  for (int chunk = 0; chunk < count; ++chunk) {
    const std::int32_t begin = chunk == 0 ? tail_.first_position() : chunk_end(chunk - 1);
    pages += most_build_pages(*context_.config, chunk_end(chunk) - begin);
  }
  return pages;
}

std::vector<Segment> HeadCache::build_chunks(int count, const TensorView& queries,
                                             int kv_head) const {
  std::vector<Segment> chunks;
  HeadContext context = context_;
  context.in_prompt = true;
  QueryMoments moments = moments_;
  PageRun run = tail_;
  const auto call_begin = static_cast<std::int32_t>(length() - queries.tokens);
  std::int32_t observed = call_begin;
  std::vector<float> rows;
  for (int chunk = 0; chunk < count; ++chunk) {
    const std::int32_t end = chunk_end(chunk);
    if (const std::int32_t until = seen_from(end); until > observed) {
      const std::int64_t tokens = until - observed;
      const std::vector<std::int64_t> counting = moments.counting(tokens * context.group);
      rows.resize(counting.size() * context.head_dim);
      load_rows(queries, kv_head, context.group, observed - call_begin, counting, rows.data());
      moments.observe_counting(rows.data(), tokens * context.group, context.head_dim);
      observed = until;
    }
    std::optional<RowFormat> format = this->format();
    if (!format && !chunks.empty()) format = chunks.front().index().table().format();
    const SegmentBuild build(context, {{}, run, end - run.first_position(), format}, moments,
                             length());
    chunks.emplace_back(build.build());
    run.pop_front(end - run.first_position());
  }
  return chunks;
}

void HeadCache::add_chunks(std::vector<Segment> chunks) noexcept {
  for (Segment& chunk : chunks) {
    tail_.pop_front(chunk.size());
    segments_.push_back(std::move(chunk));
  }
}

void HeadCache::look_back(std::int32_t first_position, std::span<const Segment> chunks,
                          AttendWorkspace& workspace) const {
  const std::int32_t block = round_down(first_position, kPromptBlock);
  workspace.segments.clear();
  workspace.tail_begin = tail_.first_position();
  for (const Segment& segment : segments_) {
    // Another layer's call for the same tokens may have made one of what this block sees whole.
    if (!segment.index().in_prompt() || seen_from(segment.end_position()) <= block)
      workspace.segments.push_back(&segment);
  }
  for (const Segment& chunk : chunks) {
    if (seen_from(chunk.end_position()) > block) break;
    workspace.segments.push_back(&chunk);
    workspace.tail_begin = chunk.end_position();
  }
}

// A mean moves away from what is taken out of it. Of keys it is that of all tokens of a node, also
// where the segment is cut.
void HeadCache::take_picks_out(const Segment& segment, std::span<const BlockSelector::Pick> picks,
                               AttendWorkspace& workspace) const {
  const SemanticIndex& index = segment.index();
  const NodeKeys& keys = index.node_keys();
  const int d = context_.head_dim, nodes = index.node_count();
  const int dims = NodeKeys::dims(index.space().metric.rank);
  workspace.node_counts.resize(nodes);
  workspace.node_values.resize(static_cast<std::size_t>(nodes) * d);
  workspace.node_keys.assign(keys.means().begin(), keys.means().end());
  workspace.node_spreads.assign(keys.spreads().begin(), keys.spreads().end());
  for (int c = 0; c < nodes; ++c) {
    workspace.node_counts[c] = static_cast<float>(segment.node_tokens(c));
    simd::kernels().to_float(segment.node_mean(c), context_.dtype,
                             &workspace.node_values[static_cast<std::size_t>(c) * d], d);
  }
  // Picks of a node follow one another, as its pages do.
  for (auto first = picks.begin(), end = first; first != picks.end(); first = end) {
    const int node = index.node_of(first->page.local_page);
    float picked = 0.0f;
    for (; end != picks.end() && index.node_of(end->page.local_page) == node; ++end)
      picked += static_cast<float>(std::popcount(end->page.slots));
    const float left = std::max(workspace.node_counts[node] -= picked, 1.0f);
    const float keys_left =
        std::max(static_cast<float>(index.far_field().tokens(node)) - picked, 1.0f);
    float key[kMaxHeadDim], mean[kMaxHeadDim], whole[kMaxHeadDim], one[kMaxHeadDim],
        sum[kMaxSketchRank], square[kMaxSketchRank];
    std::uint8_t codes[kMaxSketchRank];
    float* value = &workspace.node_values[static_cast<std::size_t>(node) * d];
    std::copy_n(value, d, whole);
    for (int i = 0; i < d; ++i) key[i] = mean[i] = workspace.node_keys[i * nodes + node];
    std::copy_n(keys.sum(node), dims, sum);
    std::copy_n(keys.square(node), dims, square);
    for (; first != end; ++first) {
      const int page = first->page.local_page;
      for (std::uint32_t slots = first->page.slots; slots != 0; slots &= slots - 1) {
        const int slot = std::countr_zero(slots);
        index.table().key(page, slot, one);
        for (int i = 0; i < d; ++i) key[i] -= (one[i] - mean[i]) / keys_left;
        index.table().value(page, slot, one);
        for (int i = 0; i < d; ++i) value[i] -= (one[i] - whole[i]) / left;
        index.sketch().read(page, slot, dims, codes);
        for (int j = 0; j < dims; ++j) {
          const auto code = static_cast<float>(codes[j]);
          sum[j] -= code;
          square[j] -= code * code;
        }
      }
    }
    for (int i = 0; i < d; ++i) workspace.node_keys[i * nodes + node] = key[i];
    for (int j = 0; j < dims; ++j)
      workspace.node_spreads[j * nodes + node] = NodeKeys::spread(sum[j], square[j], keys_left);
  }
}

void HeadCache::add_nodes(std::size_t number, std::span<const BlockSelector::Pick> picks,
                          const float* queries, int tokens, ExactAttention& attention,
                          AttendWorkspace& workspace) const {
  const simd::Kernels& kernels = simd::kernels();
  const Segment& segment = *workspace.segments[number];
  const std::int64_t rows = static_cast<std::int64_t>(tokens) * context_.group;
  const std::int64_t nodes = segment.index().node_count();
  take_picks_out(segment, picks, workspace);
  std::vector<float>&logits = workspace.node_logits, &spreads = workspace.node_spread_logits;
  logits.resize(static_cast<std::size_t>(rows * nodes));
  spreads.resize(logits.size());
  kernels.matmul(queries, workspace.node_keys.data(), logits.data(), rows, context_.head_dim,
                 nodes);
  const std::span<const float> projected = workspace.block_selector.projected(number);
  workspace.squares.assign(projected.begin(), projected.end());
  for (float& x : workspace.squares) x *= x;
  kernels.matmul(workspace.squares.data(), workspace.node_spreads.data(), spreads.data(), rows,
                 static_cast<std::int64_t>(projected.size()) / rows, nodes);
  const float cap = context_.logit_softcap;
  kernels.soft_cap(logits.data(), rows * nodes, cap);
  for (std::int64_t c = 0; c < nodes; ++c) {
    float& count = workspace.node_counts[c];
    count = count > 0.0f ? std::log(count) : -INFINITY;
  }
  if (cap > 0.0f) {  // what the cap leaves of differences
    for (std::int64_t i = 0; i < rows * nodes; ++i) {
      const float slope = 1.0f - logits[i] / cap * (logits[i] / cap);
      spreads[i] *= slope * slope;
    }
  }
  const float* count = workspace.node_counts.data();
  for (std::int64_t r = 0; r < rows; ++r) {
    float* logit = &logits[r * nodes];
    const float* spread = &spreads[r * nodes];
    for (std::int64_t c = 0; c < nodes; ++c)
      logit[c] += std::min(spread[c], kMostSpread) + count[c];
  }
  attention.add(
      logits, {workspace.node_values.data(), static_cast<std::size_t>(nodes) * context_.head_dim});
}

void HeadCache::attend_prompt(const float* queries, int tokens, std::int32_t first_position,
                              std::span<const Segment> chunks, Out out, HeadStats& stats,
                              AttendWorkspace& workspace) const {
  const int group = context_.group, d = context_.head_dim;
  look_back(first_position, chunks, workspace);
  std::int64_t choice = 0;
  for (const Segment* segment : workspace.segments) choice += segment->size();
  const float largest = largest_of(queries, static_cast<std::int64_t>(tokens) * group * d);
  stats.prompt_tokens += tokens;
  if (choice < kLeastChoice * context_.config->prefill_budget || !can_estimate(largest, held_, d)) {
    return attend_exact(queries, tokens, first_position, out, stats, workspace);
  }
  stats.sparse_prompt_tokens += tokens;
  ExactAttention attention({queries, tokens, group, QueryBlock::kAll, context_.logit_softcap}, d,
                           held_, out.rows);
  const std::int32_t end = first_position + tokens;
  attend_run(sink_, 0, first_position, end, attention, stats, workspace);
  for (const Segment& segment : segments_) {
    const auto& picked_of = workspace.segments;
    if (std::find(picked_of.begin(), picked_of.end(), &segment) == picked_of.end())
      attend_segment(segment, first_position, attention, stats, workspace);
  }
  attend_run(tail_, workspace.tail_begin, first_position, end, attention, stats, workspace);
  workspace.near_rows.resize(static_cast<std::size_t>(tokens) * group);
  attention.lse(workspace.near_rows.data());
  stats.bytes_read += workspace.block_selector.select(
      workspace.segments,
      {queries, workspace.near_rows.data(), tokens, group, context_.logit_softcap,
       context_.config->prefill_budget, round_down(first_position, kPromptBlock) - kPromptWindow},
      workspace.block_picks);
  workspace.picks.clear();
  for (const BlockSelector::Pick& pick : workspace.block_picks) {
    workspace.picks.push_back(pick.page);
  }
  attend_picks(layout_of(workspace.segments.front()->index().table()), QueryBlock::kAll, attention,
               stats, workspace);
  const std::vector<BlockSelector::Pick>& picks = workspace.block_picks;
  auto pick = picks.begin();
  for (std::size_t s = 0; s < workspace.segments.size() && context_.config->tail == "on"; ++s) {
    const auto first = pick;
    while (pick != picks.end() && pick->segment == static_cast<int>(s)) ++pick;
    add_nodes(s, {first, pick}, queries, tokens, attention, workspace);
  }
  attention.finish(out.lse);
}

}  // namespace icecache
