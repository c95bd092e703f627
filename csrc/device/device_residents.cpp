// DeviceCache: which sequences keep all their tokens on the device, in extents.
#include "device/device_cache_impl.h"

namespace icecache {

bool DeviceCache::Impl::keep_resident(int sequence, std::int64_t tokens, gpu::Stream stream) {
  const auto wanted = static_cast<std::size_t>(gpu::extents_of(tokens));
  const std::size_t held = extents[sequence].size();
  if (wanted <= held) return true;
  if (wanted > static_cast<std::size_t>(step.extents)) return false;
  std::size_t available = extent_pool.free_chunks();
  for (const auto& other : extents) {
    if (other.size() > wanted) available += other.size();
  }
  if (available < wanted - held) return false;
  while (extent_pool.free_chunks() < wanted - held) {
    const auto longest = std::max_element(
        extents.begin(), extents.end(),
        [](const auto& one, const auto& other) { return one.size() < other.size(); });
    give_up_extents(static_cast<int>(longest - extents.begin()), stream);
  }
  extent_pool.take(wanted - held, extents[sequence]);
  if (held == 0) {  // what was resident before is another's
    for (const Layer& layer : layers) {
      gpu::fill(layer.state.resident + std::int64_t{sequence} * step.kv_heads, 0x80,
                sizeof(std::int32_t) * step.kv_heads, stream);
    }
  }
  give_extents(sequence, held, stream);
  return true;
}

void DeviceCache::Impl::keep_prompt(int layer_number, int sequence, const Prompt& prompt,
                                    gpu::Stream stream) {
  if (step.extents == 0 || !prompt.is_new) return;
  const std::int64_t tokens = prompt.keys.tokens;
  const bool is_first = std::all_of(layers.begin(), layers.end(), [&](const Layer& layer) {
    return &layer == &layers[layer_number] || layer.pages[sequence].size() == 0;
  });
  if (extents[sequence].empty() && !is_first && layer_number > 0) return;
  // Extents for what is to come, or at least for the next token.
  const std::int64_t next = std::min(tokens + 1, max_tokens);
  const std::int64_t likely = named[sequence] > 0 ? named[sequence] : max_tokens;
  if (!keep_resident(sequence, std::max(likely, next), stream) &&
      !keep_resident(sequence, next, stream)) {
    return give_up_extents(sequence, stream);
  }
  gpu::KeepParams p;
  p.shape = step;
  p.layer = layers[layer_number].state;
  p.first_pair = sequence * step.kv_heads;
  p.length = static_cast<int>(tokens);
  p.keys = prompt.keys.data;
  p.values = prompt.values.data;
  p.key_head = prompt.keys.head_stride;
  p.key_token = prompt.keys.token_stride;
  p.value_head = prompt.values.head_stride;
  p.value_token = prompt.values.token_stride;
  gpu::launch_keep(p, stream);
}

void DeviceCache::Impl::give_up_extents(int sequence, gpu::Stream stream) {
  if (extents[sequence].empty()) return;
  extent_pool.give_back(extents[sequence]);
  give_extents(sequence, 0, stream);
}

void DeviceCache::Impl::fork_extents(int sequence, int from, gpu::Stream stream) {
  const std::vector<std::byte*>& source = extents[from];
  std::vector<std::byte*>& own = extents[sequence];
  if (source.empty() ||
      !keep_resident(sequence, static_cast<std::int64_t>(source.size()) * gpu::kExtentTokens,
                     stream)) {
    return give_up_extents(sequence, stream);
  }
  for (std::size_t i = 0; i < source.size(); ++i) {
    gpu::copy_on_device(own[i], source[i], extent_pool.chunk_bytes(), stream);
  }
}

void DeviceCache::Impl::give_extents(int sequence, std::size_t first, gpu::Stream stream) const {
  const std::vector<std::byte*>& own = extents[sequence];
  gpu::ExtentParams p;
  p.shape = step;
  p.layer = shared;
  p.first_pair = sequence * step.kv_heads;
  p.room = static_cast<std::int32_t>(own.size()) * gpu::kExtentTokens;
  p.head_bytes = step.extent_part_bytes() * shape.num_layers;
  do {
    p.first = static_cast<int>(first);
    p.count = static_cast<int>(std::min<std::size_t>(own.size() - first, gpu::kExtentsAtOnce));
    std::copy_n(own.begin() + p.first, p.count, p.extents);
    gpu::launch_give_extents(p, stream);
    first += static_cast<std::size_t>(p.count);
  } while (first < own.size());
}

}  // namespace icecache
