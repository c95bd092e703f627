// Config::resolved: derived values, ranges, and contradictions between parameters.
#include <algorithm>
#include <charconv>
#include <set>

#include "config/config_values.h"
#include "config/machine.h"
#include "icecache/config.h"
#include "icecache/error.h"

namespace icecache {
namespace {

// With fewer the search for a segment's basis costs more than it is worth, with more a step has
// more exact scores to make.
constexpr std::int64_t kSegmentTokens = 512;

// A prompt's tokens attend exactly to half of this many on average, beside what they pick.
constexpr std::int64_t kPrefillChunk = 2048;

constexpr std::int64_t kMaxTokens = std::int64_t{1} << 30;       // positions are 32-bit
constexpr std::int64_t kMaxPages = (std::int64_t{1} << 31) - 1;  // of a device: their numbers, too
constexpr std::int64_t kMaxThreads = 1024;
constexpr std::int64_t kMaxNodePages = 8;  // past that a summary is of tokens that are not alike

// Twice as many as are picked find nearly all that is worth picking. With few to pick sketches want
// more choice than that; past 512 exact scores cost more than they find.
constexpr std::int64_t kFewCandidates = 320, kManyCandidates = 512;

void require(std::string_view name, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value < low || value > high) {
    throw InvalidArgument(message(name, " must be from ", low, " to ", high, ", got ", value));
  }
}

void require_share(std::string_view name, double value) {
  if (!(value > 0.0 && value < 1.0)) {
    throw InvalidArgument(message(name, " must be above 0 and below 1, got ", value));
  }
}

std::int64_t pages_of(std::int64_t tokens, std::int64_t page_size) {
  return (tokens + page_size - 1) / page_size;
}

// "3, 0,3" -> {0, 3}. Throws InvalidArgument for anything but a comma-separated list of numbers.
std::set<std::int64_t> parse_layers(std::string_view text) {
  std::set<std::int64_t> layers;
  if (text.find_first_not_of(' ') == std::string_view::npos) return layers;
  for (std::string_view rest = text;;) {
    const std::size_t comma = rest.find(',');
    std::string_view item = rest.substr(0, comma);
    item.remove_prefix(std::min(item.find_first_not_of(' '), item.size()));
    item.remove_suffix(item.size() - std::min(item.find_last_not_of(' ') + 1, item.size()));
    std::int64_t layer = 0;
    const auto result = std::from_chars(item.data(), item.data() + item.size(), layer);
    if (item.empty() || result.ec != std::errc{} || result.ptr != item.data() + item.size()) {
      throw InvalidArgument(
          message("dense_layers must be layer numbers separated by commas, e.g. \"0,1\", got \"",
                  text, "\""));
    }
    layers.insert(layer);
    if (comma == std::string_view::npos) return layers;
    rest.remove_prefix(comma + 1);
  }
}

void resolve_dense_layers(Config& config, const CacheShape& shape) {
  std::string normal;
  for (const std::int64_t layer : parse_layers(config.dense_layers)) {
    if (layer < 0 || layer >= shape.num_layers) {
      throw InvalidArgument(message("dense_layers must name layers from 0 to ",
                                    shape.num_layers - 1, ", got ", layer));
    }
    if (!normal.empty()) normal += ',';
    normal += std::to_string(layer);
  }
  config.dense_layers = normal;
}

void check_words(const Config& config) {
  for (const ConfigField& field : config_fields()) {
    if (field.type != "text") continue;
    const std::string value = config.get(field.name);
    if (!config_values::is_choice(field.name, value)) {
      throw InvalidArgument(message(field.name, " must be ",
                                    config_values::choices_text(field.name), ", got \"", value,
                                    "\""));
    }
  }
}

// Token counts that one step attends to.
void resolve_budget(Config& config) {
  if (config.page_size != 8 && config.page_size != 16 && config.page_size != 32) {
    throw InvalidArgument(message("page_size must be 8, 16 or 32, got ", config.page_size));
  }
  require("token_budget", config.token_budget, 1, kMaxTokens);
  require("sink_tokens", config.sink_tokens, 0, kMaxTokens);
  require("window_tokens", config.window_tokens, 0, kMaxTokens);
  if (config.window_tokens == 0) config.window_tokens = config.token_budget <= 64 ? 16 : 32;

  const std::int64_t least = config.sink_tokens + config.window_tokens + config.page_size;
  if (config.token_budget < least) {
    throw InvalidArgument(
        message("token_budget must be at least sink_tokens + window_tokens + "
                "page_size = ",
                config.sink_tokens, " + ", config.window_tokens, " + ", config.page_size, " = ",
                least, ", got ", config.token_budget));
  }

  if (!(config.mass_target >= 0.0 && config.mass_target < 1.0)) {
    throw InvalidArgument(
        message("mass_target must be from 0 (off) to below 1, got ", config.mass_target));
  }
  require("max_token_budget", config.max_token_budget, 0, kMaxTokens);
  if (config.max_token_budget == 0) {
    config.max_token_budget = std::min(4 * config.token_budget, kMaxTokens);
  }
  if (config.max_token_budget < config.token_budget) {
    throw InvalidArgument(message("max_token_budget must be at least token_budget (",
                                  config.token_budget, "), got ", config.max_token_budget));
  }
  require("dense_tokens", config.dense_tokens, 0, kMaxTokens);
  if (config.dense_tokens == 0) config.dense_tokens = config.token_budget;
  if (config.dense_tokens < config.token_budget) {
    throw InvalidArgument(message("dense_tokens must be at least token_budget (",
                                  config.token_budget, "), got ", config.dense_tokens));
  }
  require("decode_tokens", config.decode_tokens, 1, kMaxTokens);
}

// Tokens that one step of one KV head may pick beside sink and window.
std::int64_t picked_tokens(const Config& config) {
  const std::int64_t budget =
      config.mass_target > 0.0 ? config.max_token_budget : config.token_budget;
  return budget - config.sink_tokens - config.window_tokens;
}

void resolve_index(Config& config, const CacheShape& shape) {
  if (config.sketch_rank == 0) config.sketch_rank = shape.head_dim > 64 ? 64 : 32;
  if (config.sketch_rank < 8 || config.sketch_rank > kMaxSketchRank ||
      config.sketch_rank % 8 != 0) {
    throw InvalidArgument(message("sketch_rank must be 0 or a multiple of 8 from 8 to ",
                                  kMaxSketchRank, ", got ", config.sketch_rank));
  }
  config.sketch_rank = std::min<std::int64_t>(config.sketch_rank, shape.head_dim);
  if (config.sketch_bits != 4 && config.sketch_bits != 8) {
    throw InvalidArgument(message("sketch_bits must be 4 or 8, got ", config.sketch_bits));
  }

  require("candidates", config.candidates, 0, kMaxTokens);
  const std::int64_t picked = config.token_budget - config.sink_tokens - config.window_tokens;
  if (config.candidates == 0) {
    // Never fewer than the budget, or it could not be filled; mass_target finds more as it goes.
    const std::int64_t few = config.mass_target > 0.0 ? kManyCandidates : kFewCandidates;
    config.candidates = std::max(picked, std::clamp(2 * picked, few, kManyCandidates));
  }
  if (config.candidates < picked) {
    throw InvalidArgument(
        message("candidates must be at least token_budget - sink_tokens - window_tokens = ",
                config.token_budget, " - ", config.sink_tokens, " - ", config.window_tokens, " = ",
                picked, ", got ", config.candidates));
  }

  // The smaller the budget, the more weight the summaries carry.
  if (config.far_node_tokens == 0) {
    config.far_node_tokens =
        std::max<std::int64_t>(config.page_size, config.token_budget <= 128 ? 32 : 64);
  }
  if (config.far_node_tokens < config.page_size ||
      config.far_node_tokens > kMaxNodePages * config.page_size ||
      config.far_node_tokens % config.page_size != 0) {
    throw InvalidArgument(message("far_node_tokens must be a multiple of page_size from ",
                                  config.page_size, " to ", kMaxNodePages * config.page_size,
                                  ", got ", config.far_node_tokens));
  }
  require("segment_tokens", config.segment_tokens, 0, kMaxTokens);
  if (config.segment_tokens == 0) config.segment_tokens = kSegmentTokens;
  require_share("dci_promotion", config.dci_promotion);
  require_share("dci_upper_promotion", config.dci_upper_promotion);
  require("dci_beam", config.dci_beam, 0, kMaxTokens);
}

void resolve_prefill(Config& config) {
  require("prefill_budget", config.prefill_budget, 0, kMaxTokens);
  require("prefill_chunk", config.prefill_chunk, 0, kMaxTokens);
  if (config.prefill_chunk == 0) config.prefill_chunk = kPrefillChunk;
  if (config.prefill_chunk < config.far_node_tokens) {
    throw InvalidArgument(message("prefill_chunk must be at least far_node_tokens (",
                                  config.far_node_tokens, "), got ", config.prefill_chunk));
  }
  if (config.prefill_budget > 0 && config.index != "tree") {
    throw InvalidArgument(message("prefill_budget must be 0 with index=", config.index, ", got ",
                                  config.prefill_budget, "; use index=tree"));
  }
}

void resolve_threads(Config& config) {
  require("num_threads", config.num_threads, 0, kMaxThreads);
  if (config.num_threads == 0) {
    config.num_threads = std::min<std::int64_t>(usable_cores(), kMaxThreads);
  }
  require("index_threads", config.index_threads, 0, kMaxThreads);
  if (config.index_threads == 0) config.index_threads = config.num_threads;
}

// Needs the counts of resolve_budget().
void resolve_memory(Config& config, const CacheShape& shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 60;
  require("host_memory", config.host_memory, 0, kMost);
  const bool derived = config.host_memory == 0;
  if (derived) config.host_memory = usable_memory() / 2;

  const std::int64_t size = config.page_size;
  const auto row_bytes = [&](DType dtype) {
    return static_cast<std::int64_t>(row_bytes_of(dtype, shape.head_dim));
  };
  const std::int64_t page_bytes = 2 * size * row_bytes(config.stored_dtype(shape.dtype));
  // Of a page of sink and window, which hold tokens in the model's type.
  const std::int64_t run_size = page_bytes / (2 * row_bytes(shape.dtype));
  const std::int64_t head_pages = pages_of(config.sink_tokens, run_size) +
                                  pages_of(config.window_tokens, run_size) +
                                  pages_of(config.token_budget, size);
  // In double: absurd budgets must not wrap around and pass.
  const double least = static_cast<double>(head_pages) * static_cast<double>(page_bytes) *
                       shape.num_layers * shape.num_kv_heads;
  if (static_cast<double>(config.host_memory) < least) {
    throw InvalidArgument(message(
        "host_memory must hold at least one sequence of sink, window and budget: ", head_pages,
        " pages of ", page_bytes, " bytes for each of ", shape.num_layers, " layers x ",
        shape.num_kv_heads, " KV heads = ", static_cast<std::int64_t>(std::min(least, 9e18)),
        " bytes, got ", config.host_memory, derived ? " (half of this machine's memory)" : ""));
  }

  // A picked token may stand on a page of its own.
  const std::int64_t picked = picked_tokens(config);
  const std::int64_t step_pages =
      (config.select == "page" ? pages_of(picked, size) : picked) * shape.num_kv_heads;
  require("device_pages", config.device_pages, 0, kMaxPages);
  require("device_tokens", config.device_tokens, 0, kMaxTokens);
  if (config.device_pages == 0) config.device_pages = std::min(4 * step_pages, kMaxPages);
}

}  // namespace

Config Config::resolved(const CacheShape& shape) const {
  shape.validate();
  Config result = *this;
  check_words(result);
  resolve_budget(result);
  resolve_index(result, shape);
  resolve_prefill(result);
  resolve_dense_layers(result, shape);
  resolve_threads(result);
  resolve_memory(result, shape);
  return result;
}

bool Config::is_dense_layer(int layer) const {
  if (dense_layers.empty()) return false;
  return parse_layers(dense_layers).contains(layer);
}

}  // namespace icecache
