// DeviceCache: the KV cache of a model that runs on a CUDA device.
//
// The device holds, for each (sequence, layer, KV head), sinks, a window, a sketch of every key,
// the mean values of the far-field nodes and a cache of recently used rows; pinned host memory
// holds all keys and values, in pages of similar tokens. A decode step is a chain of kernels on the
// caller's stream: it takes no decision on the host, allocates nothing and may be captured into a
// CUDA graph (csrc/cuda/step.h).
//
// Sequences stand in a batch of fixed size, each with room for what reserve() named, or for
// max_tokens. A prompt enters whole and once, also while others decode; after that a step adds one
// token to every sequence of the batch, or to those that it names one or several.
//
// With Config::device_tokens sequences are resident while device memory lasts: the device holds the
// keys and values of all their tokens, too, and a step attends to all of them. Pages and index are
// kept up to date behind that. When memory is wanted the longest gives its extents (256 tokens of
// it each) up at once, without a copy, and its next step runs within the budget; it stays so until
// it is released or gets another prompt. Which sequences are resident is decided on the device: a
// captured step stays valid. A resident prompt of up to dense_tokens tokens is indexed without a fit
// of its own: call rebuild() when it has grown.
//
// Streams: what a call launches is ordered on the stream it is given, but for the work that
// prefill() leaves to index threads with streams of their own; wait() and step() wait for it on the
// host. Threads: one caller at a time. Failure: a call that throws leaves the other sequences as
// they were; after CudaError nothing on the device can be relied on.
#pragma once

#include <cstdint>
#include <memory>

#include "icecache/config.h"
#include "icecache/head_stats.h"
#include "icecache/types.h"

namespace icecache {

struct DeviceCacheMemory {
  std::int64_t device_bytes = 0;    // all that the cache holds on the device
  std::int64_t rows_bytes = 0;      // of them: sinks, windows and cached rows
  std::int64_t index_bytes = 0;     // sketches, means, metrics, tables
  std::int64_t scratch_bytes = 0;   // shared by all layers
  std::int64_t resident_bytes = 0;  // extents of resident sequences, taken or not
  std::int64_t resident_sequences = 0;
  std::int64_t sparse_sequences = 0;  // that hold tokens and are not resident
  std::int64_t host_bytes = 0;        // pages in use
  std::int64_t token_bytes = 0;       // of device memory that a token takes where a sequence grows
  std::int64_t free_bytes = 0;        // of the device, that nobody has
  std::int64_t total_bytes = 0;       // of the device
};

class DeviceCache {
 public:
  using Stream = void*;                   // a cudaStream_t
  static constexpr int kRoomStep = 1024;  // tokens by which a sequence grows
  static constexpr int kStepTokens = 16;  // that a step adds to a sequence, at most

  // Throws InvalidArgument for what the kernels do not cover (with what they do), Unavailable
  // without CUDA in the build or a device in the machine, OutOfPages where memory does not suffice.
  DeviceCache(const CacheShape& shape, const Config& config, int batch, std::int64_t max_tokens,
              int device);
  ~DeviceCache();
  DeviceCache(const DeviceCache&) = delete;
  DeviceCache& operator=(const DeviceCache&) = delete;

  // Takes device memory for the indexes of so many tokens, of all sequences together, at once; from
  // then on there is no more. Without it memory comes as sequences grow. Throws OutOfPages. From then
  // on, too, a thread keeps host memory for one longest sequence page-locked ahead of need.
  void limit_tokens(std::int64_t tokens);
  // Gives a sequence room for at least `tokens`, on the device and in host memory, in steps of
  // kRoomStep tokens; all or nothing. Waits for the stream where it grows. A sequence that gets its
  // prompt without it has room for max_tokens. Throws InvalidArgument beyond max_tokens,
  // OutOfPages. A resident sequence gets extents for `tokens`, of longer sequences if need be, or
  // gives up its own.
  void reserve(int sequence, std::int64_t tokens, Stream stream);

  // The prompt of one sequence: keys and values [Hkv, T, D], queries [Hq, T', D] of its last tokens
  // (the last 512 / G shape the metric), all on the device, with unit stride in D and other strides
  // multiples of 16 bytes. Replaces what the sequence held in this layer. The tensors must stay as
  // they are until built().
  void prefill(int layer, int sequence, const TensorView& keys, const TensorView& values,
               const TensorView& queries, Stream stream);
  // Tokens behind those that a sequence holds in this layer, whose attention the caller computed
  // over these, which gather() gives, and over themselves: a suffix of a forked prompt, a turn of a
  // conversation. Keys and values [Hkv, T, D], queries [Hq, T', D] of the last T' >= min(T, 64) of
  // them, as for prefill(); they must stay as they are until the stream is there. Leaves what T
  // steps would leave, to the bit, and takes room as reserve() does. Waits for the stream. Throws
  // InvalidArgument for a sequence that holds no token, and beyond max_tokens; OutOfPages.
  void extend(int layer, int sequence, const TensorView& keys, const TensorView& values,
              const TensorView& queries, Stream stream);
  // Whether the tensors of every prefill() of this layer may go: its work is done.
  bool built(int layer);
  // Waits on the host until it is; rethrows its first error.
  void wait(int layer);

  // Adds one token to each of A sequences, and attends: queries [A, Hq, D], keys and values
  // [A, Hkv, D], out [A, Hq, D], contiguous. `rows` [B], on the device, is the row of each sequence
  // of the batch, -1 for one that sits this step out; null: row b is sequence b, and A = B. Rows of
  // sequences that hold no token become 0; rows of sequences that are full become NaN, and the
  // sequence stays as it is; rows of no sequence are not written.
  //
  // With `tokens`, 1..kStepTokens, `rows` is [tokens, B]: a sequence takes up to so many tokens, one
  // behind the other (drafts, and the token ahead of them), each of which attends to those before
  // it. What comes out is what as many steps of one token give, to the bit. Residents answer all
  // of them in two kernels; the others take the kernels of a step once for each of `tokens`, which
  // are launched, and idle, where there are residents alone. Throws InvalidArgument.
  void step(int layer, const void* queries, const void* keys, const void* values, void* out,
            Stream stream, const std::int32_t* rows = nullptr, int tokens = 1);

  // Builds the index of one sequence anew, from all its tokens and its recent queries, and waits
  // for it. For sequences that have grown to some times their prompt: metric, sketches and
  // far-field nodes are the prompt's until then, and tokens joined the nodes in order of position.
  void rebuild(int layer, int sequence, Stream stream);

  // Makes `sequence` a copy of `from` in every layer: full pages are shared, the rest is copied.
  void fork(int sequence, int from, Stream stream);
  // Takes tokens back, so that the sequence holds the first `length`; layers that hold fewer keep
  // theirs. Tokens that came one by one since the last build cost a kernel, those before them a
  // build of what is left. Throws InvalidArgument for a length beyond the longest layer's;
  // OutOfPages may leave some layers longer than others: call it again, or release.
  void truncate(int sequence, std::int64_t length, Stream stream);
  // As truncate(), but that a sequence which holds fewer tokens stays as it is. Ordered on the
  // stream, and nothing is waited for, where the tokens came since the last build and no fork shares
  // their pages: rejected drafts cost one kernel for all layers. Throws InvalidArgument for a length
  // below 1.
  void take_back(int sequence, std::int64_t length, Stream stream);
  // Takes the extents of a resident sequence at once: its next step runs within the budget. Ordered
  // on the stream; nothing is waited for.
  void evict(int sequence, Stream stream);
  // Empties a sequence in every layer.
  void release(int sequence, Stream stream);

  // Tokens of a sequence in a layer; waits for the stream.
  std::int64_t length(int layer, int sequence, Stream stream);
  // Tokens of a sequence in order of position: keys, values [Hkv, length, D], contiguous on the
  // device.
  void gather(int layer, int sequence, void* keys, void* values, Stream stream);
  // Of one KV head; -1: sums over all.
  HeadStats stats(int layer, int kv_head, Stream stream);
  DeviceCacheMemory memory() const;

  const CacheShape& shape() const;
  const Config& config() const;  // resolved
  int batch() const;
  std::int64_t max_tokens() const;
  int device() const;

 private:
  struct Impl;
  struct Prompt;
  void build(int layer, int sequence, const Prompt& prompt, Stream stream);
  // Of chunks and pages, as reserve() says.
  void make_room(int sequence, std::int64_t tokens, Stream stream);
  // Builds the index of the first `kept` of a sequence's `length` tokens.
  void build_anew(int layer, int sequence, std::int64_t length, std::int64_t kept, Stream stream);
  std::unique_ptr<Impl> impl_;
};

}  // namespace icecache
