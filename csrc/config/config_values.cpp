#include "config/config_values.h"

#include <algorithm>

namespace icecache::config_values {
namespace {

constexpr std::string_view kIndex[] = {"tree", "dci", "positional", "faiss"};
constexpr std::string_view kKvDtype[] = {"auto", "int8"};
constexpr std::string_view kSelect[] = {"token", "page"};
constexpr std::string_view kTail[] = {"on", "off"};
constexpr std::string_view kIntegrity[] = {"off", "sampled", "always"};
constexpr std::string_view kTelemetry[] = {"off", "on", "trace"};
constexpr std::string_view kPositionalBound[] = {"quest", "mean"};
constexpr std::string_view kFaissSearch[] = {"sketch", "flat", "ivf", "hnsw"};

struct Choices {
  std::string_view field;
  std::span<const std::string_view> words;
};
constexpr Choices kChoices[] = {
    {"kv_dtype", kKvDtype},
    {"index", kIndex},
    {"select", kSelect},
    {"tail", kTail},
    {"integrity", kIntegrity},
    {"telemetry", kTelemetry},
    {"positional_bound", kPositionalBound},
    {"faiss_search", kFaissSearch},
};

constexpr std::string_view kDerivable[] = {"window_tokens", "candidates",    "max_token_budget",
                                           "dense_tokens",  "host_memory",   "device_pages",
                                           "num_threads",   "index_threads", "dci_beam"};

}  // namespace

std::span<const std::string_view> choices(std::string_view field) {
  for (const Choices& entry : kChoices) {
    if (entry.field == field) return entry.words;
  }
  return {};
}

bool is_choice(std::string_view field, std::string_view value) {
  const auto words = choices(field);
  return words.empty() || std::find(words.begin(), words.end(), value) != words.end();
}

std::string choices_text(std::string_view field) {
  const auto words = choices(field);
  std::string text;
  for (std::size_t i = 0; i < words.size(); ++i) {
    if (i > 0) text += i + 1 == words.size() ? " or " : ", ";
    text += words[i];
  }
  return text;
}

bool is_derivable(std::string_view field) {
  return std::find(std::begin(kDerivable), std::end(kDerivable), field) != std::end(kDerivable);
}

}  // namespace icecache::config_values
