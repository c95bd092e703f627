// What a DeviceCache of a configuration looks like to the kernels.
#pragma once

#include <cstdint>

#include "cuda/step.h"
#include "icecache/config.h"

namespace icecache {

// `config` is `given`, resolved. Throws InvalidArgument for what the device does not support, with
// what it does.
gpu::StepShape step_shape(const CacheShape& shape, const Config& config, const Config& given,
                          int batch, std::int64_t max_tokens);

}  // namespace icecache
