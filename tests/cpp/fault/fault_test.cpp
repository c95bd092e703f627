// What include/icecache/engine.h promises where memory, pages or threads run out: a call that
// throws leaves every sequence as it was, and done again it goes on as if nothing had been.
//
// Each case is a whole life of an engine in a process of its own, in which one allocation fails.
// ICECACHE_FAULT_ALL=1 runs a case for every allocation; else, a sample that is spread over all.
// ICECACHE_FAULT_NTH=N runs one case, and ICECACHE_FAULT_TRACE=1 prints where the fault is.
//
// Exceptions, until an index is no longer inserted into: where a fault hits "insert", the head may
// attend exactly, or with another arrangement of its pages, from then on; all else holds. The same
// is true of a step of several tokens within the budget, which inserts between them. Where the
// fault hits "build", decoding goes on without the segment. Where pages run out in "update", the
// tokens stay in the tail until the next call that brings queries.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "fault/injector.h"
#include "fault/life.h"
#include "icecache/error.h"

namespace icecache::fault {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::int64_t kCases = 12;
constexpr unsigned kSeconds = 120;
#else
constexpr std::int64_t kCases = 200;
constexpr unsigned kSeconds = 30;
#endif
constexpr std::size_t kMostOutputs = 1 << 17;

// What a child tells its parent.
struct Report {
  std::int64_t count, live, pool_bytes, outputs;
  bool fired, several_tokens_threw;
  char place[16], failure[400];
  float output[kMostOutputs];
};

class Shared {
 public:
  Shared()
      : report_(static_cast<Report*>(mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE,
                                          MAP_SHARED | MAP_ANONYMOUS, -1, 0))) {}
  ~Shared() { munmap(report_, sizeof(Report)); }
  Report& operator*() const { return *report_; }
  Report* operator->() const { return report_; }

 private:
  Report* report_;
};

void write(std::string_view text, char* to, std::size_t room) {
  const std::size_t n = std::min(text.size(), room - 1);
  std::memcpy(to, text.data(), n);
  to[n] = 0;
}

// In the child.
void live(const LifeOptions& options, Kind kind, std::int64_t nth, Report& report) {
  Life life(options);
  exempt_this_thread();
  const std::int64_t before = live_blocks();
  arm(kind, nth);
  LifeRecord record = life.run();
  report.count = count();
  report.fired = fired();
  report.several_tokens_threw = record.several_tokens_threw;
  write(place() == nullptr ? "" : place(), report.place, sizeof report.place);
  write(record.failure, report.failure, sizeof report.failure);
  report.pool_bytes = record.pool_bytes;
  report.outputs = static_cast<std::int64_t>(record.outputs.size());
  std::copy(record.outputs.begin(), record.outputs.end(), report.output);
  record = {};
  report.live = live_blocks() - before;
}

// How a child ended, where not by exit(0).
std::string run_child(const LifeOptions& options, Kind kind, std::int64_t nth, Report& report) {
  std::memset(&report, 0, offsetof(Report, output));
  const pid_t child = fork();
  if (child == 0) {
    alarm(kSeconds);
    live(options, kind, nth, report);
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return "";
  return WIFSIGNALED(status) ? std::string("died of ") + strsignal(WTERMSIG(status))
                             : "exited with " + std::to_string(WEXITSTATUS(status));
}

std::int64_t cases_of(const LifeOptions& options, std::int64_t all) {
  if (const char* text = std::getenv("ICECACHE_FAULT_ALL"); text != nullptr && *text == '1') {
    return all;
  }
  std::int64_t cases = kCases;
  if (const char* text = std::getenv("ICECACHE_FAULT_CASES"); text != nullptr) {
    cases = std::atoll(text);
  }
#if defined(__SANITIZE_ADDRESS__)
  // FAISS allocates 16 MB in each round of k-means. The sanitizer marks them all, which makes a life
  // three times as long as with another index.
  if (options.index == "faiss") cases = std::min(cases, kCases);
#else
  (void)options;
#endif
  return std::min(all, cases);
}

std::int64_t nth_case(std::int64_t i, std::int64_t all, std::int64_t cases) {
  const char* text = std::getenv("ICECACHE_FAULT_NTH");
  return text != nullptr ? std::atoll(text) : 1 + (2 * i + 1) * all / (2 * cases);
}

struct Case {
  const char* name;
  LifeOptions options;
  Kind kind;
};

void PrintTo(const Case& that, std::ostream* out) {
  *out << that.name;
}

class Fault : public ::testing::TestWithParam<Case> {
 protected:
  // Where `nth` failed: what was not as promised.
  std::string broken(const std::string& end, Kind kind) const {
    if (!end.empty()) return end;
    if (report_->failure[0] != 0) return report_->failure;
    const std::string_view place = report_->place;
    const bool excepted = place == "insert" || place == "build" ||
                          (place == "update" && kind == Kind::kPages) ||
                          report_->several_tokens_threw;
    if (report_->outputs != static_cast<std::int64_t>(expected_.size())) return "outputs missing";
    for (std::int64_t i = 0; i < report_->outputs; ++i) {
      if (!std::isfinite(report_->output[i])) return "an output is no number";
    }
    if (excepted) return "";
    if (std::memcmp(report_->output, expected_.data(), expected_.size() * sizeof(float)) != 0) {
      return "the outputs are others";
    }
    if (report_->pool_bytes != pool_bytes_) return "another number of pages is in use";
    if (report_->live > live_) return "memory is leaked";
    return "";
  }
  void learn(const Case& that) {
    ASSERT_EQ(run_child(that.options, that.kind, 0, *report_), "") << "without a fault";
    ASSERT_STREQ(report_->failure, "") << "without a fault";
    expected_.assign(report_->output, report_->output + report_->outputs);
    pool_bytes_ = report_->pool_bytes;
    live_ = report_->live;
  }

  Shared report_;
  std::vector<float> expected_;
  std::int64_t pool_bytes_ = 0, live_ = 0;
};

TEST_P(Fault, ChangesNothing) {
  const Case& that = GetParam();
#ifndef ICECACHE_HAVE_FAISS
  if (that.options.index == "faiss") GTEST_SKIP() << "FAISS is not in this build";
#endif
  learn(that);
  const std::int64_t all = report_->count, cases = cases_of(that.options, all);
  ASSERT_GT(all, 5);
  std::int64_t fired = 0, failures = 0, excepted = 0;
  for (std::int64_t i = 0; i < cases; ++i) {
    const std::int64_t nth = nth_case(i, all, cases);
    LifeOptions options = that.options;
    options.checks_at_once = i % 2 == 0;
    const std::string end = run_child(options, that.kind, nth, *report_);
    fired += report_->fired;
    excepted += report_->place[0] != 0 || report_->several_tokens_threw;
    const std::string why = broken(end, that.kind);
    if (why.empty()) continue;
    if (++failures <= 10) {
      ADD_FAILURE() << "allocation " << nth << " of " << all << " ("
                    << (report_->place[0] != 0 ? report_->place : "anywhere") << "), "
                    << (options.checks_at_once ? "checked at once: " : "done again at once: ")
                    << why;
    }
  }
  std::printf(
      "%s: %lld allocations, %lld cases, %lld faults, %lld of them in insert, build, "
      "update or a step of several tokens; %lld not as promised\n",
      that.name, static_cast<long long>(all), static_cast<long long>(cases),
      static_cast<long long>(fired), static_cast<long long>(excepted),
      static_cast<long long>(failures));
  EXPECT_EQ(failures, 0);
  EXPECT_GT(fired, cases * 9 / 10) << "the cases must reach their faults";
}

LifeOptions options_of(const char* index, int threads = 1, int index_threads = 1) {
  LifeOptions options;
  options.index = index;
  options.num_threads = threads;
  options.index_threads = index_threads;
  if (options.index == "faiss") options.faiss_search = "flat";
  return options;
}

LifeOptions options_of_eight_bits(const char* index = "tree") {
  LifeOptions options = options_of(index);
  options.kv_dtype = "int8";
  return options;
}

LifeOptions options_of_prompts() {
  LifeOptions options = options_of("tree");
  options.picks_in_prompts = true;
  return options;
}

INSTANTIATE_TEST_SUITE_P(
    Of, Fault,
    ::testing::Values(Case{"MemoryTree", options_of("tree"), Kind::kMemory},
                      Case{"MemoryDci", options_of("dci"), Kind::kMemory},
                      Case{"MemoryPositional", options_of("positional"), Kind::kMemory},
                      Case{"MemoryFaiss", options_of("faiss"), Kind::kMemory},
                      Case{"MemoryManyThreads", options_of("tree", 3, 3), Kind::kMemory},
                      Case{"MemoryPrompts", options_of_prompts(), Kind::kMemory},
                      Case{"PagesPrompts", options_of_prompts(), Kind::kPages},
                      Case{"MemoryEightBits", options_of_eight_bits(), Kind::kMemory},
                      Case{"PagesEightBits", options_of_eight_bits(), Kind::kPages},
                      Case{"MemoryEightBitsDci", options_of_eight_bits("dci"), Kind::kMemory},
                      Case{"PagesTree", options_of("tree"), Kind::kPages},
                      Case{"PagesDci", options_of("dci"), Kind::kPages},
                      Case{"PagesPositional", options_of("positional"), Kind::kPages},
                      Case{"PagesFaiss", options_of("faiss"), Kind::kPages},
                      Case{"Threads", options_of("tree", 4, 3), Kind::kThreads}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace icecache::fault
