#include "icecache/config.h"

#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "config/config_values.h"
#include "config/machine.h"
#include "icecache/error.h"
#include "refusal.h"

namespace icecache::config_test {
namespace {

CacheShape smollm2() {
  CacheShape shape;
  shape.num_layers = 30;
  shape.num_q_heads = 9;
  shape.num_kv_heads = 3;
  shape.head_dim = 64;
  return shape;
}

std::string refusal(const std::function<void()>& call) {
  return testing::refusal<InvalidArgument>(call);
}
std::string refusal(const Config& config, const CacheShape& shape = smollm2()) {
  return refusal([&] { config.resolved(shape); });
}
Config with(std::string_view name, std::string_view value) {
  Config config;
  config.set(name, value);
  return config;
}

// ---- Fields by name

TEST(ConfigFields, EachHasUniqueNameKnownTypeAndMeaning) {
  std::set<std::string_view> names;
  for (const ConfigField& field : config_fields()) {
    EXPECT_TRUE(names.insert(field.name).second) << field.name;
    EXPECT_TRUE((std::set<std::string_view>{"int", "real", "text", "flag"}.contains(field.type)))
        << field.name;
    EXPECT_FALSE(field.meaning.empty()) << field.name;
  }
  EXPECT_TRUE(names.contains("token_budget"));
}

TEST(ConfigFields, DefaultsRoundTripThroughText) {
  const Config defaults;
  for (const ConfigField& field : config_fields()) {
    EXPECT_EQ(defaults.get(field.name), field.default_value) << field.name;
    Config config;
    config.set(field.name, field.default_value);
    EXPECT_EQ(config.get(field.name), field.default_value) << field.name;
  }
}

TEST(ConfigFields, ClosedSetsContainTheirDefault) {
  for (const ConfigField& field : config_fields()) {
    EXPECT_TRUE(config_values::is_choice(field.name, field.default_value)) << field.name;
  }
}

TEST(ConfigSet, ChangesTheNamedFieldOnly) {
  Config config = with("token_budget", "128");
  EXPECT_EQ(config.token_budget, 128);
  EXPECT_EQ(config.page_size, 16);
  config.set("mass_target", "0.98");
  EXPECT_DOUBLE_EQ(config.mass_target, 0.98);
  config.set("index", "dci");
  EXPECT_EQ(config.index, "dci");
  config.set("seed", "-3");
  EXPECT_EQ(config.get("seed"), "-3");
}

TEST(ConfigSet, UnknownNameSuggestsTheNearest) {
  Config config;
  EXPECT_MENTIONS(refusal([&] { config.set("token_buget", "1"); }), "\"token_budget\"");
  EXPECT_MENTIONS(refusal([&] { config.set("windowtokens", "1"); }), "\"window_tokens\"");
  EXPECT_MENTIONS(refusal([&] { config.set("hostmem", "1"); }), "\"host_memory\"");
  EXPECT_MENTIONS(refusal([&] { (void)config.get("sede"); }), "\"seed\"");
}

TEST(ConfigSet, BytesTakeSuffixes) {
  EXPECT_EQ(with("host_memory", "8G").host_memory, std::int64_t{8} << 30);
  EXPECT_EQ(with("host_memory", "512M").host_memory, std::int64_t{512} << 20);
  EXPECT_EQ(with("host_memory", "64 KiB").host_memory, std::int64_t{64} << 10);
  EXPECT_EQ(with("host_memory", "1.5gb").host_memory, std::int64_t{3} << 29);
  EXPECT_EQ(with("host_memory", "2T").host_memory, std::int64_t{2} << 40);
  EXPECT_EQ(with("host_memory", "123").host_memory, 123);
  for (const char* bad : {"", "G", "8X", "8GG", "1e400G", "99999999T", "nanG", "infG"}) {
    EXPECT_MENTIONS(refusal([&] { with("host_memory", bad); }), "8G") << bad;
  }
}

TEST(ConfigSet, SuffixesAreForBytesOnly) {
  EXPECT_MENTIONS(refusal([] { with("token_budget", "1K"); }), "whole number");
}

TEST(ConfigSet, AutoStandsForDerivedValues) {
  Config config;
  config.num_threads = 7;
  config.set("num_threads", "auto");
  EXPECT_EQ(config.num_threads, 0);
  EXPECT_MENTIONS(refusal([] { with("page_size", "auto"); }), "page_size");
}

TEST(ConfigSet, FlagsTakeTheUsualWords) {
  for (const char* word : {"true", "True", "on", "yes", "1"}) {
    EXPECT_TRUE(with("exact", word).exact) << word;
  }
  for (const char* word : {"false", "False", "off", "no", "0"}) {
    EXPECT_FALSE(with("exact", word).exact) << word;
  }
  EXPECT_MENTIONS(refusal([] { with("exact", "maybe"); }), "true or false, got \"maybe\"");
}

TEST(ConfigSet, BadValuesNameTheAcceptedFormAndChangeNothing) {
  Config config;
  EXPECT_MENTIONS(refusal([&] { config.set("token_budget", "12.5"); }), "got \"12.5\"");
  EXPECT_MENTIONS(refusal([&] { config.set("token_budget", "99999999999999999999"); }),
                  "whole number");
  EXPECT_MENTIONS(refusal([&] { config.set("mass_target", "most"); }), "a number");
  EXPECT_MENTIONS(refusal([&] { config.set("mass_target", "nan"); }), "a number");
  EXPECT_MENTIONS(refusal([&] { config.set("index", "trees"); }),
                  "tree, dci, positional or faiss, got \"trees\"");
  for (const ConfigField& field : config_fields()) {
    EXPECT_EQ(config.get(field.name), field.default_value) << field.name;
  }
}

// ---- Derived values

TEST(ConfigResolved, FillsInEveryDerivedValue) {
  const Config config = Config{}.resolved(smollm2());
  EXPECT_EQ(config.window_tokens, 32);
  EXPECT_EQ(config.max_token_budget, 1024);
  EXPECT_EQ(config.candidates, 440);
  EXPECT_EQ(config.far_node_tokens, 64);
  EXPECT_EQ(config.prefill_chunk, 2048);
  EXPECT_EQ(config.num_threads, usable_cores());
  EXPECT_EQ(config.index_threads, config.num_threads);
  EXPECT_EQ(config.host_memory, usable_memory() / 2);
  EXPECT_EQ(config.device_pages, 4 * 3 * (256 - 4 - 32));
}

TEST(ConfigResolved, IsIdempotent) {
  const Config once = Config{}.resolved(smollm2());
  const Config twice = once.resolved(smollm2());
  for (const ConfigField& field : config_fields()) {
    EXPECT_EQ(once.get(field.name), twice.get(field.name)) << field.name;
  }
}

TEST(ConfigResolved, KeepsGivenValues) {
  Config config;
  config.window_tokens = 48;
  config.far_node_tokens = 96;
  config.segment_tokens = 100;
  config.prefill_chunk = 640;
  config.sketch_rank = 48;
  config.candidates = 300;
  config.num_threads = 3;
  config.index_threads = 1;
  config.host_memory = std::int64_t{1} << 30;
  config.device_pages = 5000;
  const Config resolved = config.resolved(smollm2());
  for (const ConfigField& field : config_fields()) {
    if (field.name == "max_token_budget" || field.name == "dense_tokens") continue;
    EXPECT_EQ(resolved.get(field.name), config.get(field.name)) << field.name;
  }
}

TEST(ConfigResolved, WindowShrinksAtSmallBudgets) {
  EXPECT_EQ(with("token_budget", "64").resolved(smollm2()).window_tokens, 16);
  EXPECT_EQ(with("token_budget", "65").resolved(smollm2()).window_tokens, 32);
}

TEST(ConfigResolved, SummariesAreFinerAtSmallBudgets) {
  EXPECT_EQ(with("token_budget", "128").resolved(smollm2()).far_node_tokens, 32);
  EXPECT_EQ(with("token_budget", "129").resolved(smollm2()).far_node_tokens, 64);
}

TEST(ConfigResolved, CandidatesCoverThePicks) {
  EXPECT_EQ(with("token_budget", "64").resolved(smollm2()).candidates, 320);
  EXPECT_EQ(with("token_budget", "356").resolved(smollm2()).candidates, 512);
  EXPECT_EQ(with("token_budget", "1000").resolved(smollm2()).candidates, 1000 - 36);
  Config massive;
  massive.mass_target = 0.98;
  massive.token_budget = 64;  // more follow where the target asks for them
  EXPECT_EQ(massive.resolved(smollm2()).candidates, 512);
}

TEST(ConfigResolved, SketchRankFollowsTheHeadDimension) {
  CacheShape shape = smollm2();
  shape.head_dim = 128;
  EXPECT_EQ(Config{}.resolved(shape).sketch_rank, 64);
  shape.head_dim = 256;
  EXPECT_EQ(Config{}.resolved(shape).sketch_rank, 64);
  shape.head_dim = 24;
  EXPECT_EQ(Config{}.resolved(shape).sketch_rank, 24);
  EXPECT_EQ(Config{}.resolved(smollm2()).sketch_rank, 32);
}

TEST(ConfigResolved, PagePicksNeedFewerDeviceSlots) {
  EXPECT_EQ(with("select", "page").resolved(smollm2()).device_pages, 4 * 3 * 14);
}

TEST(ConfigResolved, DenseLayersAreParsedSortedAndUnique) {
  const Config config = with("dense_layers", " 29, 0,0 ").resolved(smollm2());
  EXPECT_EQ(config.dense_layers, "0,29");
  EXPECT_TRUE(config.is_dense_layer(0));
  EXPECT_TRUE(config.is_dense_layer(29));
  EXPECT_FALSE(config.is_dense_layer(2));
  EXPECT_FALSE(Config{}.is_dense_layer(0));
}

// ---- Refusals: value and limit are named

TEST(ConfigResolved, RefusesBudgetBelowSinkWindowAndOnePage) {
  Config config;
  config.token_budget = 51;
  config.window_tokens = 32;
  EXPECT_MENTIONS(refusal(config), "4 + 32 + 16 = 52, got 51");
  config.token_budget = 52;
  EXPECT_EQ(refusal(config), "");
}

TEST(ConfigResolved, RefusesValuesOutsideTheirList) {
  for (const char* size : {"0", "4", "12", "24", "64"}) {
    EXPECT_MENTIONS(refusal(with("page_size", size)), "page_size must be 8, 16 or 32");
  }
  for (const char* bits : {"0", "2", "16"}) {
    EXPECT_MENTIONS(refusal(with("sketch_bits", bits)), "sketch_bits must be 4 or 8");
  }
  for (const char* rank : {"-8", "12", "264"}) {
    EXPECT_MENTIONS(refusal(with("sketch_rank", rank)), "sketch_rank must be 0 or a multiple of 8");
  }
  for (const char* target : {"-0.1", "1.0", "2"}) {
    EXPECT_MENTIONS(refusal(with("mass_target", target)), "mass_target");
  }
  for (const char* share : {"0", "1", "-1"}) {
    EXPECT_MENTIONS(refusal(with("dci_promotion", share)), "dci_promotion");
    EXPECT_MENTIONS(refusal(with("dci_upper_promotion", share)), "dci_upper_promotion");
  }
}

TEST(ConfigResolved, DenseTokensAreAtLeastTheBudget) {
  EXPECT_EQ(with("token_budget", "128").resolved(smollm2()).dense_tokens, 128);
  EXPECT_EQ(with("dense_tokens", "1000").resolved(smollm2()).dense_tokens, 1000);
  EXPECT_MENTIONS(refusal(with("dense_tokens", "255")),
                  "dense_tokens must be at least token_budget (256), got 255");
}

TEST(ConfigResolved, AcceptsEverySupportedPageSize) {
  for (const char* size : {"8", "16", "32"}) EXPECT_EQ(refusal(with("page_size", size)), "");
}

TEST(ConfigResolved, RefusesWordsSetWithoutSet) {
  Config config;
  config.select = "tokens";
  EXPECT_MENTIONS(refusal(config), "select must be token or page, got \"tokens\"");
}

TEST(ConfigResolved, RefusesNegativeCounts) {
  for (const char* name :
       {"token_budget", "sink_tokens", "window_tokens", "candidates", "max_token_budget",
        "dense_tokens", "decode_tokens", "host_memory", "device_pages", "device_tokens",
        "num_threads", "index_threads", "dci_beam", "far_node_tokens"}) {
    const std::string text = refusal(with(name, "-1"));
    EXPECT_MENTIONS(text, name);
    EXPECT_MENTIONS(text, "got -1");
  }
}

TEST(ConfigResolved, RefusesFarNodesThatAreNotOneToEightPages) {
  for (const char* tokens : {"8", "40", "144"}) {
    EXPECT_MENTIONS(refusal(with("far_node_tokens", tokens)),
                    std::string("far_node_tokens must be a multiple of page_size from 16 to 128, "
                                "got ") +
                        tokens);
  }
}

TEST(ConfigResolved, RefusesMaximumBelowBudget) {
  EXPECT_MENTIONS(refusal(with("max_token_budget", "255")), "token_budget (256), got 255");
}

TEST(ConfigResolved, RefusesWhatDoesNotFitThirtyTwoBits) {
  for (const std::string name : {"max_token_budget", "device_pages", "device_tokens"}) {
    EXPECT_MENTIONS(refusal(with(name, "4294967296")), name + " must be from 0 to ");
  }
}

TEST(ConfigResolved, RefusesFewerCandidatesThanPicks) {
  EXPECT_MENTIONS(refusal(with("candidates", "219")), "256 - 4 - 32 = 220, got 219");
}

TEST(ConfigResolved, RefusesLayersThatDoNotExist) {
  EXPECT_MENTIONS(refusal(with("dense_layers", "30")), "from 0 to 29, got 30");
  EXPECT_MENTIONS(refusal(with("dense_layers", "-1")), "got -1");
  for (const char* text : {"a", "1,", ",1", "1 2", "1.5"}) {
    EXPECT_MENTIONS(refusal(with("dense_layers", text)), "separated by commas") << text;
  }
}

TEST(ConfigResolved, RefusesHostMemoryBelowOneSequence) {
  // 1 sink + 2 window + 16 budget pages of 2 x 16 x 64 x 4 bytes, 30 layers, 3 heads.
  const std::int64_t least = std::int64_t{19} * 8192 * 30 * 3;
  Config config;
  config.host_memory = least - 1;
  const std::string text = refusal(config);
  EXPECT_MENTIONS(text, std::to_string(least));
  EXPECT_MENTIONS(text, "got " + std::to_string(least - 1));
  config.host_memory = least;
  EXPECT_EQ(refusal(config), "");
}

TEST(ConfigResolved, RefusesBudgetsWhoseBytesExceedAnyMachine) {
  EXPECT_MENTIONS(refusal(with("token_budget", "1073741824")), "host_memory");
  EXPECT_MENTIONS(refusal(with("token_budget", "9223372036854775807")), "token_budget");
}

TEST(ConfigResolved, RefusesShapesThatAreNotSupported) {
  CacheShape shape = smollm2();
  shape.head_dim = 60;
  EXPECT_MENTIONS(refusal(Config{}, shape), "head_dim");
}

}  // namespace
}  // namespace icecache::config_test
