#include "device/device_shape.h"

#include <algorithm>
#include <numeric>

#include "cuda/device.h"
#include "icecache/error.h"

namespace icecache {
namespace {

constexpr std::int64_t kCachedSteps = 3;  // candidates of as many steps fit the row cache

}  // namespace

gpu::StepShape step_shape(const CacheShape& shape, const Config& config, const Config& given,
                          int batch, std::int64_t max_tokens) {
  constexpr int kMaxBatch = 65535;  // a row of the kernels' grid is a sequence and KV head
  if (batch < 1 || batch > kMaxBatch) {
    throw InvalidArgument(message("batch must be from 1 to ", kMaxBatch, ", got ", batch));
  }
  const auto refuse = [](const char* name, const auto& got, const char* supported) {
    throw InvalidArgument(message("device=cuda: ", name, " must be ", supported, ", got ", got));
  };
  if (config.kv_dtype != "auto")
    refuse("kv_dtype", config.kv_dtype, "auto (a device's pages hold what the model makes)");
  if (config.index != "tree") refuse("index", config.index, "tree");
  if (config.select != "token") refuse("select", config.select, "token");
  if (config.exact)
    refuse("exact", "true", "false (attend with the model's own attention instead)");
  if (config.prefill_budget > 0)
    refuse("prefill_budget", config.prefill_budget, "0 (a device's prompts attend to everything)");
  if (config.mass_target > 0.0) refuse("mass_target", config.mass_target, "0");
  if (!config.dense_layers.empty()) refuse("dense_layers", config.dense_layers, "empty");
  if (config.integrity != "off") refuse("integrity", config.integrity, "off");
  if (config.telemetry == "trace") refuse("telemetry", config.telemetry, "on or off");
  if (config.dense_tokens > config.token_budget)
    refuse("dense_tokens", config.dense_tokens, "at most token_budget");
  if (config.sketch_bits != 4) refuse("sketch_bits", config.sketch_bits, "4");
  if (shape.logit_softcap != 0.0f)
    refuse("logit_softcap", shape.logit_softcap, "0 (run other models on the CPU)");
  gpu::StepShape s;
  s.batch = batch;
  s.kv_heads = shape.num_kv_heads;
  s.group = shape.group();
  s.head_dim = shape.head_dim;
  s.dtype = shape.dtype;
  s.page_size = static_cast<int>(config.page_size);
  s.sink_tokens = static_cast<int>(config.sink_tokens);
  s.window_tokens = static_cast<int>(config.window_tokens);
  s.select_tokens = static_cast<int>(config.token_budget) - s.near_rows();
  s.candidates = static_cast<int>(config.candidates);
  s.far_node_tokens = static_cast<int>(config.far_node_tokens);
  s.rank = static_cast<int>(config.sketch_rank);
  s.tail = config.tail == "on";
  s.scale = shape.softmax_scale();
  const std::int64_t rows = given.device_pages > 0
                                ? config.device_pages * config.page_size / shape.num_kv_heads
                                : kCachedSteps * config.candidates;
  s.cached_rows = static_cast<int>(std::clamp<std::int64_t>(rows, 2 * gpu::kMaxCandidates, 32767));
  if (max_tokens <= s.near_rows() || max_tokens > (std::int64_t{1} << 26)) {
    throw InvalidArgument(message("max_tokens must be above sink_tokens + window_tokens = ",
                                  s.near_rows(), " and at most ", 1 << 26, ", got ", max_tokens));
  }
  const std::int64_t unit = std::lcm<std::int64_t>(s.far_node_tokens, s.page_size);
  s.token_room = static_cast<int>((max_tokens - s.near_rows() + unit - 1) / unit * unit);
  s.extents = static_cast<int>(std::min(gpu::extents_of(config.device_tokens),
                                        gpu::extents_of(s.near_rows() + s.token_room)));
  s.multiprocessors = gpu::multiprocessors();
  gpu::check_shape(s);
  return s;
}

}  // namespace icecache
