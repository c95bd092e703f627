// DeviceCache: whole sequences are built anew, copied, shortened, let go of and read.
#include "device/device_cache_impl.h"
#include "icecache/error.h"

namespace icecache {

void DeviceCache::rebuild(int layer_number, int sequence, Stream stream) {
  const std::int64_t tokens = length(layer_number, sequence, stream);
  if (impl_->indexed(tokens) > 0) build_anew(layer_number, sequence, tokens, tokens, stream);
}

void DeviceCache::build_anew(int layer_number, int sequence, std::int64_t tokens, std::int64_t kept,
                             Stream stream) {
  Impl& self = *impl_;
  const Impl::Layer& layer = self.layers[layer_number];
  const gpu::StepShape& s = self.step;
  const gpu::DeviceScope here(self.device);
  const std::int64_t d = s.head_dim;
  const auto bytes = static_cast<std::size_t>(tokens * s.kv_heads * d) * size_of(s.dtype);
  const gpu::Buffer keys(bytes, stream), values(bytes, stream);
  self.fetch(layer, sequence, tokens, keys.data(), values.data(), stream);
  // The ring of queries is read before the build writes it: a copy.
  const std::int64_t rows = std::int64_t{s.kv_heads} * s.group;
  const auto query_bytes =
      static_cast<std::size_t>(rows * gpu::kRecentQueries * d) * size_of(s.dtype);
  const auto* queries = static_cast<const std::byte*>(layer.state.recent_queries) +
                        static_cast<std::int64_t>(query_bytes) * sequence;
  const gpu::Buffer recent(query_bytes, stream);
  gpu::copy_on_device(recent.data(), queries, query_bytes, stream);
  const auto view = [&](void* data, std::int64_t heads, std::int64_t of_head, std::int64_t count) {
    return TensorView{data,        s.dtype, static_cast<int>(heads), count, static_cast<int>(d),
                      of_head * d, d};
  };
  build(layer_number, sequence,
        {view(keys.data(), s.kv_heads, tokens, kept), view(values.data(), s.kv_heads, tokens, kept),
         view(recent.data(), rows, gpu::kRecentQueries, gpu::kRecentQueries), false},
        stream);
  wait(layer_number);
}

void DeviceCache::limit_tokens(std::int64_t tokens) {
  Impl& self = *impl_;
  constexpr std::int64_t kMost = std::int64_t{1} << 40;  // its bytes fit 64 bits
  if (tokens < 1 || tokens > kMost) {
    throw InvalidArgument(message("tokens must be from 1 to ", kMost, ", got ", tokens));
  }
  const gpu::DeviceScope here(self.device);
  const auto slabs = static_cast<std::size_t>((tokens - 1) / gpu::kChunkTokens + 1);
  self.chunk_pool.limit(slabs);
  self.spare_pages = self.full_pages(self.room_of(slabs)) * self.layers.size();
  self.take_pages_ahead();
}

void DeviceCache::reserve(int sequence, std::int64_t tokens, Stream stream) {
  make_room(sequence, tokens, stream);
  Impl& self = *impl_;
  self.named[sequence] = std::max(self.named[sequence], tokens);
  const std::size_t extents = self.extents[sequence].size();
  if (extents == 0 || tokens <= static_cast<std::int64_t>(extents) * gpu::kExtentTokens) return;
  const gpu::DeviceScope here(self.device);
  if (!self.keep_resident(sequence, tokens, stream)) self.give_up_extents(sequence, stream);
}

void DeviceCache::make_room(int sequence, std::int64_t tokens, Stream stream) {
  Impl& self = *impl_;
  self.check_sequence("sequence", sequence);
  if (tokens < 0) throw InvalidArgument(message("tokens must not be negative, got ", tokens));
  if (tokens > self.step.near_rows() + self.step.token_room) {
    throw InvalidArgument(
        message("a sequence has at most max_tokens = ", self.max_tokens, " tokens, got ", tokens));
  }
  const auto wanted = static_cast<std::size_t>(
      std::max<std::int64_t>(0, self.indexed(tokens) - 1) / gpu::kChunkTokens + 1);
  std::vector<std::byte*>& chunks = self.chunks[sequence];
  const std::size_t held = chunks.size();
  if (wanted <= held) return;
  const gpu::DeviceScope here(self.device);
  const std::size_t pages = self.full_pages(self.room_of(wanted));
  const auto heads = static_cast<std::size_t>(self.step.kv_heads);
  std::vector<PageSet> more(self.layers.size());
  for (std::size_t i = 0; i < more.size(); ++i) {
    const std::size_t before = self.layers[i].pages[sequence].size();
    if (before == 0) continue;  // they come with the layer's prompt
    more[i] = PageSet(self.pool, pages - before, heads, {sequence, static_cast<int>(i), -1});
    self.layers[i].pages[sequence].reserve(pages);
  }
  self.chunk_pool.take(wanted - held, chunks);
  for (std::size_t i = 0; i < more.size(); ++i) {
    PageSet& own = self.layers[i].pages[sequence];
    const std::size_t before = own.size();
    if (before == 0) continue;
    own.append(std::move(more[i]));
    self.write_table(self.layers[i], sequence, own, before, stream);
  }
  self.give_chunks(sequence, stream);
  self.take_pages_ahead();
}

void DeviceCache::extend(int layer_number, int sequence, const TensorView& keys,
                         const TensorView& values, const TensorView& queries, Stream stream) {
  Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  const std::int64_t before = length(layer_number, sequence, stream);
  self.check_view("keys", keys, s.kv_heads, 0);
  self.check_view("values", values, s.kv_heads, keys.tokens);
  self.check_view("queries", queries, s.kv_heads * s.group, 0);
  if (queries.tokens > keys.tokens) {
    throw InvalidArgument(message("queries must be of at most the ", keys.tokens,
                                  " tokens of keys, got ", queries.tokens));
  }
  if (before == 0) {
    throw InvalidArgument(message("sequence must hold tokens in layer ", layer_number, ", got ",
                                  sequence, "; its first tokens are a prompt"));
  }
  reserve(sequence, before + keys.tokens, stream);
  const gpu::DeviceScope here(self.device);
  gpu::check_stream(stream, self.device);
  gpu::ExtendParams p;
  p.shape = s;
  p.layer = self.layers[layer_number].state;
  p.first_pair = sequence * s.kv_heads;
  p.length = static_cast<int>(before);
  p.count = static_cast<int>(keys.tokens);
  p.keys = keys.data;
  p.values = values.data;
  p.queries = queries.data;
  p.query_tokens = static_cast<int>(queries.tokens);
  p.key_head = keys.head_stride;
  p.key_token = keys.token_stride;
  p.value_head = values.head_stride;
  p.value_token = values.token_stride;
  p.query_head = queries.head_stride;
  p.query_token = queries.token_stride;
  gpu::launch_extend(p, stream);
}

void DeviceCache::fork(int sequence, int from, Stream stream) {
  Impl& self = *impl_;
  const gpu::StepShape& s = self.step;
  self.check_sequence("sequence", sequence);
  self.check_sequence("from", from);
  if (sequence == from) return;
  const gpu::DeviceScope here(self.device);
  std::vector<PageSet> pages;
  for (int number = 0; number < self.shape.num_layers; ++number) {
    const Impl::Layer& layer = self.layers[number];
    if (layer.pages[from].size() == 0) {
      throw InvalidArgument(message("from must be a sequence that holds tokens, got ", from));
    }
    const std::int64_t tokens = self.indexed(length(number, from, stream));
    pages.push_back(self.pages_from(layer.pages[from], tokens, {sequence, number, -1}));
  }
  const std::vector<std::byte*>& source = self.chunks[from];
  std::vector<std::byte*>& own = self.chunks[sequence];
  if (own.size() < source.size()) self.chunk_pool.take(source.size() - own.size(), own);
  self.chunk_pool.give_back(own, source.size());
  self.give_chunks(sequence, stream);
  for (std::size_t c = 0; c < own.size(); ++c) {
    gpu::copy_on_device(own[c], source[c], self.chunk_pool.chunk_bytes(), stream);
  }
  self.named[sequence] = self.named[from];
  self.fork_extents(sequence, from, stream);
  for (int number = 0; number < self.shape.num_layers; ++number) {
    Impl::Layer& layer = self.layers[number];
    gpu::copy_pairs(s, layer.state, static_cast<std::int64_t>(from) * s.kv_heads,
                    static_cast<std::int64_t>(sequence) * s.kv_heads, stream);
    self.give_pages(layer, sequence, std::move(pages[number]), stream);
    layer.order[sequence] = layer.order[from];
  }
}

void DeviceCache::truncate(int sequence, std::int64_t kept, Stream stream) {
  Impl& self = *impl_;
  std::vector<std::int64_t> lengths;
  for (int number = 0; number < self.shape.num_layers; ++number) {
    lengths.push_back(length(number, sequence, stream));
  }
  const std::int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (kept < 0 || kept > longest) {
    throw InvalidArgument(message("length must be from 0 to ", longest, " (the tokens of sequence ",
                                  sequence, "), got ", kept));
  }
  if (kept == 0) return release(sequence, stream);
  const gpu::DeviceScope here(self.device);
  for (int number = 0; number < self.shape.num_layers; ++number) {
    Impl::Layer& layer = self.layers[number];
    if (lengths[number] <= kept) continue;
    if (self.has_to_build(layer, sequence, kept)) {
      build_anew(number, sequence, lengths[number], kept, stream);
      continue;
    }
    // Pages that will be written again must be the sequence's own.
    const PageSet& pages = layer.pages[sequence];
    const bool is_shared = self.shares_what_is_written(layer, sequence, kept);
    PageSet own;
    if (is_shared) own = self.pages_from(pages, self.indexed(kept), {sequence, number, -1});
    self.launch_truncate(number, 1, sequence, kept, stream);
    if (is_shared) self.give_pages(layer, sequence, std::move(own), stream);
  }
}

void DeviceCache::take_back(int sequence, std::int64_t most, Stream stream) {
  Impl& self = *impl_;
  self.check_sequence("sequence", sequence);
  if (most < 1) throw InvalidArgument(message("length must be at least 1, got ", most));
  bool waits = false;
  for (int number = 0; number < self.shape.num_layers; ++number) {
    wait(number);
    const Impl::Layer& layer = self.layers[number];
    waits = waits || self.has_to_build(layer, sequence, most) ||
            self.shares_what_is_written(layer, sequence, most);
  }
  if (!waits) {
    const gpu::DeviceScope here(self.device);
    const std::int64_t kept =
        std::min(most, self.step.near_rows() + std::int64_t{self.step.token_room});
    return self.launch_truncate(0, self.shape.num_layers, sequence, kept, stream);
  }
  std::int64_t longest = 0;
  for (int number = 0; number < self.shape.num_layers; ++number) {
    longest = std::max(longest, length(number, sequence, stream));
  }
  if (longest > most) truncate(sequence, most, stream);
}

void DeviceCache::release(int sequence, Stream stream) {
  Impl& self = *impl_;
  self.check_sequence("sequence", sequence);
  const gpu::DeviceScope here(self.device);
  for (int number = 0; number < self.shape.num_layers; ++number) {
    wait(number);
    Impl::Layer& layer = self.layers[number];
    gpu::fill(layer.state.lengths + sequence * self.step.kv_heads, 0xff,
              sizeof(std::int32_t) * self.step.kv_heads, stream);
  }
  gpu::synchronize(stream);  // steps that read the pages
  for (Impl::Layer& layer : self.layers) {
    layer.pages[sequence] = PageSet();
    layer.order[sequence].clear();
  }
  self.chunk_pool.give_back(self.chunks[sequence]);
  self.give_up_extents(sequence, stream);
  self.named[sequence] = 0;
}

void DeviceCache::evict(int sequence, Stream stream) {
  impl_->check_sequence("sequence", sequence);
  const gpu::DeviceScope here(impl_->device);
  impl_->give_up_extents(sequence, stream);
}

void DeviceCache::gather(int layer_number, int sequence, void* keys, void* values, Stream stream) {
  const std::int64_t tokens = length(layer_number, sequence, stream);
  const gpu::DeviceScope here(impl_->device);
  impl_->fetch(impl_->layers[layer_number], sequence, tokens, keys, values, stream);
}

}  // namespace icecache
