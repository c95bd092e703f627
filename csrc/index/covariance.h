// Covariance of rows, from a sample of them.
#pragma once

#include <cstdint>
#include <vector>

namespace icecache {

// Every how many of `count` rows a sample takes. More rows change an estimate by less than the
// quantisation of what is made of it.
std::int64_t sample_stride(std::int64_t count);

// [D, D] about `mean` [D], of every stride-th row of x [N, D].
std::vector<double> covariance_of(const float* x, std::int64_t count, std::int64_t stride, int d,
                                  const std::vector<float>& mean);

}  // namespace icecache
