// DeviceCache in a build without CUDA: it says so, and never comes into being.
#include "cuda/cuda_info.h"
#include "icecache/device_cache.h"
#include "icecache/error.h"

namespace icecache {
namespace {

[[noreturn]] void refuse() {
  throw Unavailable("device=cuda: " + cuda_info().message);
}

}  // namespace

struct DeviceCache::Impl {};

DeviceCache::DeviceCache(const CacheShape& shape, const Config&, int, std::int64_t, int) {
  shape.validate();
  refuse();
}
DeviceCache::~DeviceCache() = default;

void DeviceCache::limit_tokens(std::int64_t) {
  refuse();
}
void DeviceCache::reserve(int, std::int64_t, Stream) {
  refuse();
}
void DeviceCache::prefill(int, int, const TensorView&, const TensorView&, const TensorView&,
                          Stream) {
  refuse();
}
void DeviceCache::extend(int, int, const TensorView&, const TensorView&, const TensorView&,
                         Stream) {
  refuse();
}
bool DeviceCache::built(int) {
  refuse();
}
void DeviceCache::wait(int) {
  refuse();
}
void DeviceCache::step(int, const void*, const void*, const void*, void*, Stream,
                       const std::int32_t*, int) {
  refuse();
}
void DeviceCache::rebuild(int, int, Stream) {
  refuse();
}
void DeviceCache::fork(int, int, Stream) {
  refuse();
}
void DeviceCache::truncate(int, std::int64_t, Stream) {
  refuse();
}
void DeviceCache::take_back(int, std::int64_t, Stream) {
  refuse();
}
void DeviceCache::evict(int, Stream) {
  refuse();
}
void DeviceCache::release(int, Stream) {
  refuse();
}
std::int64_t DeviceCache::length(int, int, Stream) {
  refuse();
}
void DeviceCache::gather(int, int, void*, void*, Stream) {
  refuse();
}
HeadStats DeviceCache::stats(int, int, Stream) {
  refuse();
}
DeviceCacheMemory DeviceCache::memory() const {
  refuse();
}
const CacheShape& DeviceCache::shape() const {
  refuse();
}
const Config& DeviceCache::config() const {
  refuse();
}
int DeviceCache::batch() const {
  refuse();
}
std::int64_t DeviceCache::max_tokens() const {
  refuse();
}
int DeviceCache::device() const {
  refuse();
}

}  // namespace icecache
