// Every parameter of the engine, once: name, type, default, unit and meaning.
// The Python Config class, the CLI's options and README's table are generated from config_fields().
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "icecache/types.h"

namespace icecache {

// ICECACHE_CONFIG(X) expands X(type, name, default, unit, meaning) for each parameter.
// Types: int (std::int64_t), real (double), text (std::string), flag (bool).
// 0 or "auto" stands for "derived": Config::resolved() replaces it by the value in use.
#define ICECACHE_CONFIG(X)                                                                        \
  X(int, token_budget, 256, "tokens",                                                             \
    "tokens attended exactly per KV head and step: sink + window + selected")                     \
  X(int, page_size, 16, "tokens", "tokens of one page: 8, 16 or 32")                              \
  X(int, sink_tokens, 4, "tokens", "first tokens of a sequence, always attended")                 \
  X(int, window_tokens, 0, "tokens",                                                              \
    "most recent tokens, always attended; 0: 16 at budgets up to 64, else 32")                    \
  X(text, kv_dtype, "auto", "",                                                                   \
    "keys and values in the pages of an index: auto (as the model makes them) or int8 (eight "    \
    "bits each and a scale for each token, half of what 16 bits take)")                           \
  X(text, index, "tree", "", "tree, dci (the paper's), positional, faiss")                        \
  X(text, select, "token", "", "what the budget is spent on: token or page")                      \
  X(text, tail, "on", "", "on: tokens that are not selected take part through summaries; off")    \
  X(int, sketch_rank, 0, "dims",                                                                  \
    "directions kept in the sketch of a key, a multiple of 8; 0: 32, or 64 where the head "       \
    "dimension is above 64")                                                                      \
  X(int, sketch_bits, 4, "bits", "bits of one sketch coordinate: 4 or 8")                         \
  X(int, candidates, 0, "tokens",                                                                 \
    "tokens found by sketch and rescored with their exact keys; 0: twice as many as the budget "  \
    "picks, from 320 (with mass_target 512) to 512, or as many as it picks")                      \
  X(int, far_node_tokens, 0, "tokens",                                                            \
    "tokens that share one far-field summary; 0: 32 at budgets up to 128, else 64")               \
  X(int, segment_tokens, 0, "tokens",                                                             \
    "decoded tokens that are sealed together into a segment of the index, and until then "        \
    "attended exactly beside token_budget; 0: 512")                                               \
  X(text, dense_layers, "", "", "layers that always attend in full, e.g. \"0,1\"")                \
  X(int, dense_tokens, 0, "tokens",                                                               \
    "sequences of up to this many tokens attend in full; 0: token_budget. On a CPU that is as "   \
    "fast as selecting up to about 1,500")                                                        \
  X(real, mass_target, 0.0, "",                                                                   \
    "0: off; else tokens are added past token_budget until this share of the attention mass")     \
  X(int, max_token_budget, 0, "tokens", "bound of mass_target; 0: 4 x token_budget")              \
  X(flag, exact, false, "",                                                                       \
    "attend to every token: full attention, over keys and values as kv_dtype keeps them")         \
  X(int, decode_tokens, 32, "tokens",                                                             \
    "calls with up to this many new tokens on an indexed sequence are decode steps; larger ones " \
    "are prefill chunks and attend exactly")                                                      \
  X(int, prefill_budget, 0, "tokens",                                                             \
    "0: a prompt attends to all of itself; else tokens that 64 of its tokens together pick per "  \
    "KV head of what is beyond their own chunk, whose rest takes part through summaries")         \
  X(int, prefill_chunk, 0, "tokens",                                                              \
    "with prefill_budget: tokens of a prompt that become a segment of the index before the rest " \
    "of it is attended for; 0: 2048")                                                             \
  X(int, host_memory, 0, "bytes", "bound of the page pool; 0: half of the machine's memory")      \
  X(int, device_pages, 0, "pages",                                                                \
    "page slots on the device; 0: four times what one step of one layer selects")                 \
  X(int, device_tokens, 0, "tokens",                                                              \
    "tokens, of all sequences of a cache together, whose keys and values a CUDA device holds in " \
    "all layers: sequences attend to everything while they fit, and the longest gives way")       \
  X(int, num_threads, 0, "threads", "threads of one attend call, caller included; 0: all cores")  \
  X(int, index_threads, 0, "threads", "threads that build and update indexes; 0: as num_threads") \
  X(text, integrity, "off", "", "page headers verified before use: off, sampled or always")       \
  X(text, telemetry, "on", "", "off, on (counters and mass), trace (also what was selected)")     \
  X(int, seed, 0, "", "seed of every random choice")                                              \
  X(real, dci_promotion, 0.03, "", "index=dci: share of tokens promoted to the first level")      \
  X(real, dci_upper_promotion, 0.2, "", "index=dci: share promoted at each level above")          \
  X(int, dci_beam, 0, "nodes", "index=dci: beam width; 0: max(N / 1000, 30)")                     \
  X(text, positional_bound, "quest", "", "index=positional: quest (min/max bound) or mean")       \
  X(text, faiss_search, "sketch", "",                                                             \
    "index=faiss: candidates by sketch, flat, ivf or hnsw search over exact keys")

struct ConfigField {
  std::string_view name, type, default_value, unit, meaning;
};

// In declaration order; static storage.
std::span<const ConfigField> config_fields();

struct Config {
  using int_t = std::int64_t;
  using real_t = double;
  using text_t = std::string;
  using flag_t = bool;
#define ICECACHE_MEMBER(type, name, default_value, unit, meaning) type##_t name = default_value;
  ICECACHE_CONFIG(ICECACHE_MEMBER)
#undef ICECACHE_MEMBER

  // Sets a field from text ("256", "true", "8G" for bytes). Throws InvalidArgument with the nearest
  // field name for an unknown one, and with the accepted form for a bad value.
  void set(std::string_view name, std::string_view value);
  std::string get(std::string_view name) const;

  // A copy with every derived value filled in, checked against `shape` and against itself.
  // Throws InvalidArgument: values that contradict each other are refused with both numbers.
  Config resolved(const CacheShape& shape) const;

  bool is_dense_layer(int layer) const;
  // Type of rows in the pages of an index, by kv_dtype, where the model's keys and values are `model`.
  DType stored_dtype(DType model) const {
    return kv_dtype == "int8" ? DType::kInt8 : model;
  }
};

}  // namespace icecache
