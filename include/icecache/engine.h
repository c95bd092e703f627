// Engine: the KV cache of one model for many sequences, and attention over it.
//
// Threads: an Engine may be called from any thread; one mutex serialises the calls. The index of a
// prompt, or of a chunk of one, is built on the engine's own threads behind the caller; the next
// call that touches the same (sequence, layer) waits for it. A decode step waits for nothing: a
// segment that is built meanwhile takes over at a length that was fixed when its building began.
// The same calls give bitwise the same results, also if host_memory is nearly full.
// Failure: a call that throws leaves every sequence as it was before the call, and can be done
// again. Where memory runs out in the background, the next call that waits for the work does it
// again; without memory once more, the tokens are attended exactly until a later call indexes them.
// Where memory runs out while a decode step inserts into an index that grows by itself (dci), that
// head attends exactly until its index is built anew.
// Retained sequences are the exception: any call may end them, also one that throws.
// Destruction: background work that is under way ends first; what has not begun is dropped.
// fork(): the child may use an engine that no other thread was in, and whose background work was
// done, when the process forked. Calls on others throw Error there, and their memory stays taken.
// Numbers: any finite keys, values and queries are fine; NaN and Inf are refused in keys and
// values. A query with NaN or Inf gives NaN for its own head and token, changes no other output and
// shapes no metric. Logits are computed as floats, and as doubles where floats have no room for
// them.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "icecache/config.h"
#include "icecache/head_stats.h"
#include "icecache/step_trace.h"
#include "icecache/types.h"

namespace icecache {

struct MemoryStats {
  std::int64_t pool_bytes = 0;  // pages in use x page size
  std::int64_t pool_capacity = 0;
  std::int64_t index_bytes = 0;   // sketches, summaries, tables
  std::int64_t query_bytes = 0;   // recent queries, and sums of them, that shape the metric
  std::int64_t device_bytes = 0;  // what the device holds (or would hold) for these sequences
  std::int64_t sequences = 0;
  std::int64_t retained_sequences = 0;  // of `sequences`
  std::int64_t retained_bytes = 0;      // pages that only retained sequences hold
  std::int64_t evicted_sequences = 0;   // retained ones that have ended for want of pages
  // A CUDA device's: those whose tokens it holds all, and its memory for such.
  std::int64_t resident_sequences = 0;
  std::int64_t resident_bytes = 0;
};

// How a call of Engine::step treats the tokens of one sequence.
enum class Phase : std::uint8_t {
  kAuto = 0,  // as append() and attend() do
  // A chunk of a prompt, more of it to come: exact, or within prefill_budget. No step finds it yet.
  kPrefill = 1,
  kPromptEnd = 2,  // the last chunk of a prompt: likewise, then indexed behind the caller
  // Drafted tokens that are checked: exact, and else as decoding, whatever their number.
  kVerify = 3,
};

// Decoded tokens (kAuto up to decode_tokens, kVerify up to 64) change the index when they stay: when
// the next attend(), step() or observe() of the layer begins. Those that truncate() takes back
// before leave nothing in the index, the metric or HeadStats, but for what exact attention of them
// read. With an index of segments (tree, faiss) a call of up to window_tokens tokens of kAuto
// therefore answers bitwise as calls of one token each, also where some of them are taken back.

// With prefill_budget a prompt's tokens attend exactly to sinks, to their own chunk and to what their
// block of 64 tokens picks, and to the rest by summaries (docs/index.md). Calls that are cut where a
// sequence has a multiple of 64 tokens answer bitwise as one call. Segments of chunks are made beside
// their tokens in the call: where there are no pages for that, it attends exactly.

class Engine {
 public:
  // Throws InvalidArgument for shapes and configurations that are not supported.
  Engine(const CacheShape& shape, const Config& config);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  SeqId new_sequence();
  // A sequence with the same tokens. They share all segments and pages until one side writes, and
  // whatever either appends, the segments up to there.
  SeqId fork(SeqId sequence);
  // A fork with the first `length` tokens of every layer. Throws InvalidArgument if length exceeds
  // the number of tokens.
  SeqId fork(SeqId sequence, std::int64_t length);
  // Keeps the first `length` tokens of every layer. Throws InvalidArgument if length exceeds the
  // number of tokens.
  void truncate(SeqId sequence, std::int64_t length);
  void release(SeqId sequence);
  std::int64_t length(SeqId sequence, int layer) const;
  // Keeps a sequence for forks of it alone, as long as nobody wants its memory: where a call needs
  // pages, retained sequences end, the least recently used first. Retaining and forking use one.
  // It takes no more tokens: calls that would change it throw InvalidArgument. release() ends it.
  void retain(SeqId sequence);
  // False for what was released, or was retained and has ended.
  bool contains(SeqId sequence) const;

  // Appends T tokens to each of B sequences: keys[b], values[b] are [Hkv, T, D] in the cache's
  // dtype. T may differ between sequences. Throws InvalidArgument for NaN or Inf (naming sequence,
  // head and position) and OutOfPages; then no sequence is changed.
  void append(std::span<const SeqId> sequences, int layer, std::span<const TensorView> keys,
              std::span<const TensorView> values);

  // Causal attention of the last T tokens: queries[b] and outputs[b] are [Hq, T, D], query t stands
  // at position length - T + t. Within the token budget where the sequence is indexed and T <=
  // decode_tokens, exact else. `phases`: one per sequence, or none for kAuto. Several layers of a
  // model may attend to the tokens of one, each with queries of its own, which all shape the metric:
  // the layer that appends calls step(), the others attend(). Of the calls for one prompt the last
  // one gives kPromptEnd and the others kPrefill, or else a call waits for the index. Throws
  // InvalidArgument where rows of outputs or lse share memory with one another or with an input; so
  // does step().
  // lse[b], if there are any, is [Hq, T, 1] in float32, and becomes the log of the sum of exp(logit)
  // over the tokens that a row of outputs is the mean of: all that the query sees, and within the
  // budget those attended exactly and the estimated weight of the summaries. An attention sink of
  // logit s turns a row into sigmoid(lse - s) times itself. Infinite where logits are no floats, NaN
  // for a query with NaN or Inf.
  void attend(std::span<const SeqId> sequences, int layer, std::span<const TensorView> queries,
              std::span<const TensorView> outputs, std::span<const Phase> phases = {},
              std::span<const TensorView> lse = {});

  // append() and then attend() for the same tokens, in one call: both or neither. A prompt in
  // chunks of kPrefill and one of kPromptEnd has the index that it would have in one chunk, however
  // it is cut; not with kv_dtype = "int8", where a chunk reads those before it in eight bits, which
  // are fitted to the first of them.
  void step(std::span<const SeqId> sequences, int layer, std::span<const TensorView> keys,
            std::span<const TensorView> values, std::span<const TensorView> queries,
            std::span<const TensorView> outputs, std::span<const Phase> phases = {},
            std::span<const TensorView> lse = {});

  // Takes the last counts[b] tokens of one layer back: for a caller that cannot use what append()
  // or step() did, as after an interrupt. Throws InvalidArgument for more than there are.
  void take_back(std::span<const SeqId> sequences, int layer, std::span<const std::int64_t> counts);

  // For callers that computed the attention of a first chunk themselves: the chunk's last queries
  // [Hq, T, D] shape the metric, and clustering starts behind the caller, but not with kPrefill.
  void observe(std::span<const SeqId> sequences, int layer, std::span<const TensorView> queries,
               std::span<const Phase> phases = {});

  // Waits for all background work; throws nothing. What the work threw, the next call for the same
  // (sequence, layer) throws.
  void synchronize();

  // Copies all tokens in order of position: keys, values [Hkv, L, D], contiguous rows, none of
  // which share memory.
  void gather(SeqId sequence, int layer, const TensorView& keys, const TensorView& values) const;

  HeadStats stats(int layer, int kv_head) const;
  void reset_stats();
  MemoryStats memory() const;
  // Of MemoryStats only pool_bytes; waits for nothing.
  std::int64_t pool_bytes() const;
  // The last decode step of (sequence, layer, KV head); empty where there was none.
  StepTrace trace(SeqId sequence, int layer, int kv_head) const;
  // Waits for all background work; throws IntegrityError where an invariant does not hold.
  void check_integrity() const;

  const CacheShape& shape() const;
  const Config& config() const;  // resolved

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Versions and what was built in.
struct BuildInfo {
  std::string version, compiler, cuda_version, faiss_version;
  bool cuda = false, faiss = false, debug = false;
};
BuildInfo build_info();
// The kernels in use: "avx512", "avx2" or "scalar". Throws InvalidArgument where ICECACHE_SIMD asks
// for what this CPU or build does not have.
std::string simd_level();

}  // namespace icecache
