// The kernels of build.h. Device code: seen by cuda_build.cu alone.
#pragma once

#include <cmath>

#include "cuda/build.h"
#include "cuda/chunk.h"
#include "cuda/gpu.h"

namespace icecache::gpu {

constexpr int kBuildBlock = 256;
constexpr int kWideBlock = 1024;
constexpr int kDirectionRows = 2048;  // that a direction is estimated from, or up to twice as many
constexpr int kPowerSteps = 4;

// Floats as unsigned integers of the same order.
__device__ __forceinline__ std::uint32_t ordered(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(std::uint32_t x) {
  return __uint_as_float(x & 0x80000000u ? x & 0x7fffffffu : ~x);
}

template <typename T>
__global__ void __launch_bounds__(kBuildBlock) sample_kernel(const BuildParams p) {
  const int h = blockIdx.y, d = p.shape.head_dim, keys = p.key_samples;
  const int tokens = p.length - p.first;
  const T* from_keys = static_cast<const T*>(p.keys) + h * p.key_head;
  const T* from_values = static_cast<const T*>(p.values) + h * p.value_head;
  const std::int64_t all = static_cast<std::int64_t>(keys + p.query_samples) * d;
  for (std::int64_t i = blockIdx.x * kBuildBlock + threadIdx.x; i < all;
       i += static_cast<std::int64_t>(gridDim.x) * kBuildBlock) {
    const int row = static_cast<int>(i / d), at = static_cast<int>(i % d);
    if (row < keys) {
      const std::int64_t token = p.first + static_cast<std::int64_t>(row) * tokens / keys;
      const std::int64_t to = (static_cast<std::int64_t>(h) * keys + row) * d + at;
      p.sampled_keys[to] = to_float(from_keys[token * p.key_token + at]);
      p.sampled_values[to] = to_float(from_values[token * p.value_token + at]);
    } else {
      const int q = row - keys, token = q / p.shape.group, g = q % p.shape.group;
      p.sampled_queries[(static_cast<std::int64_t>(h) * p.query_samples + q) * d + at] =
          to_float(static_cast<const T*>(
              p.queries)[(h * p.shape.group + g) * p.query_head +
                         static_cast<std::int64_t>(p.query_tokens - 1 - token) * p.query_token +
                         at]);
    }
  }
}

// Coordinates of keys, or of values. A thread for each (token, few coordinates); the basis passes
// through shared memory by slices.
template <typename T, bool OfValues>
__global__ void __launch_bounds__(kBuildBlock) coordinates_kernel(const BuildParams p) {
  constexpr int kSlice = 32, kMaxRank = 64, kTokens = 64;
  __shared__ float basis[kSlice * kMaxRank];
  __shared__ float rows[kTokens * (kSlice + 1)];
  __shared__ float centre[kSlice];
  const int h = blockIdx.y, d = p.shape.head_dim, thread = threadIdx.x, width = p.width();
  const int rank = OfValues ? kValueRank : p.shape.rank, skipped = OfValues ? p.shape.rank : 0;
  const int x = p.first_pair + h, tokens = p.length - p.first;
  const T* from = OfValues ? static_cast<const T*>(p.values) + h * p.value_head
                           : static_cast<const T*>(p.keys) + h * p.key_head;
  const std::int64_t stride = OfValues ? p.value_token : p.key_token;
  const float* to_space = OfValues ? p.from_value + static_cast<std::int64_t>(h) * d * rank
                                   : p.layer.from_key + static_cast<std::int64_t>(x) * d * rank;
  const float* mean = p.layer.mean_key + static_cast<std::int64_t>(x) * d;
  // Four threads to a token, rank / 4 coordinates each.
  constexpr int kMost = kMaxRank / 4;
  const int each = rank / 4, own = thread / 4, quarter = thread % 4;
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTokens; begin < tokens;
       begin += static_cast<std::int64_t>(gridDim.x) * kTokens) {
    float sums[kMost] = {};
    for (int first = 0; first < d; first += kSlice) {
      __syncthreads();
      for (int i = thread; i < kSlice * rank; i += kBuildBlock) {
        basis[i] = to_space[static_cast<std::int64_t>(first) * rank + i];
      }
      if (thread < kSlice) centre[thread] = OfValues ? 0.0f : mean[first + thread];
      for (int i = thread; i < kTokens * kSlice; i += kBuildBlock) {
        const std::int64_t token = begin + i / kSlice;
        rows[i / kSlice * (kSlice + 1) + i % kSlice] =
            token < tokens ? to_float(from[(p.first + token) * stride + first + i % kSlice]) : 0.0f;
      }
      __syncthreads();
      for (int i = 0; i < kSlice; ++i) {
        const float k = rows[own * (kSlice + 1) + i] - centre[i];
#pragma unroll
        for (int j = 0; j < kMost; ++j) {
          if (j < each) sums[j] += k * basis[i * rank + quarter * each + j];
        }
      }
    }
    const std::int64_t token = begin + own;
    if (token < tokens) {
      float* out = p.coordinates + (static_cast<std::int64_t>(h) * tokens + token) * width +
                   skipped + quarter * each;
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (j < each) out[j] = OfValues && !std::isfinite(sums[j]) ? 0.0f : sums[j];
      }
    }
  }
}

static __global__ void __launch_bounds__(kBuildBlock) range_start_kernel(const BuildParams p) {
  for (int i = threadIdx.x; i < p.shape.kv_heads * p.shape.rank; i += kBuildBlock) {
    p.range[2 * i] = ~0u;
    p.range[2 * i + 1] = 0;
  }
}

static __global__ void __launch_bounds__(kBuildBlock) range_kernel(const BuildParams p) {
  const int h = blockIdx.y, rank = p.shape.rank, r = threadIdx.x % rank;
  const int tokens = p.length - p.first, rows = kBuildBlock / rank;
  float low = INFINITY, high = -INFINITY;
  for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * rows + threadIdx.x / rank;
       t < tokens; t += static_cast<std::int64_t>(gridDim.x) * rows) {
    const float y = p.coordinates[(static_cast<std::int64_t>(h) * tokens + t) * p.width() + r];
    low = fminf(low, y);
    high = fmaxf(high, y);
  }
  std::uint32_t* range = p.range + (h * rank + r) * 2;
  atomicMin(range, ordered(low));
  atomicMax(range + 1, ordered(high));
}

// Codes' ranges, from the coordinates'.
static __global__ void __launch_bounds__(kBuildBlock) levels_kernel(const BuildParams p) {
  const int h = blockIdx.x, rank = p.shape.rank, r = threadIdx.x;
  if (r >= rank) return;
  const std::uint32_t* range = p.range + (h * rank + r) * 2;
  const float low = from_ordered(range[0]), high = from_ordered(range[1]);
  const std::int64_t at = static_cast<std::int64_t>(p.first_pair + h) * rank + r;
  p.layer.low[at] = low;
  p.layer.step[at] = fmaxf(high - low, 1e-9f) / 15.0f;
}

static __global__ void __launch_bounds__(kBuildBlock) order_kernel(const BuildParams p) {
  for (int i = blockIdx.x * kBuildBlock + threadIdx.x; i < p.indexed;
       i += gridDim.x * kBuildBlock) {
    p.order[static_cast<std::int64_t>(blockIdx.y) * p.indexed + i] = i;
  }
}

__device__ __forceinline__ const float* coordinates_of(const BuildParams& p, int h, int token) {
  const int offset = p.shape.sink_tokens - p.first;  // index token 0 among the coordinates
  return p.coordinates +
         (static_cast<std::int64_t>(h) * (p.length - p.first) + offset + token) * p.width();
}

// The row that is farthest, of those that the warps found, each at its distance; of equal ones the
// first. `far` and `far_row`: shared, one of each warp. All threads of the block call it.
template <int Threads>
__device__ __forceinline__ int farthest_row(float distance, int row, float* far, int* far_row) {
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x % kWarp == 0) {
    far[warp] = distance;
    far_row[warp] = row;
  }
  __syncthreads();
  for (int w = 0; w < Threads / kWarp; ++w) {
    if (far[w] > distance || (far[w] == distance && far_row[w] < row)) {
      distance = far[w];
      row = far_row[w];
    }
  }
  return row;
}

// The principal direction of one segment of one head, by power iteration:
// 1. The mean of the rows.
// 2. The direction from there to the row farthest from it is the first guess.
// 3. Each step multiplies the direction by the rows' covariance.
// A warp takes every kWarps-th row; a lane holds one to three coordinates. The first levels, whose
// few parts have many rows, get more warps for each.
template <int Threads>
__global__ void __launch_bounds__(Threads) direction_kernel(const BuildParams p) {
  constexpr int kWarps = Threads / kWarp, kMost = 3;
  __shared__ float rows_sum[kWarps][kMost * kWarp];
  __shared__ float direction[kMost * kWarp], mean[kMost * kWarp];
  __shared__ float totals[kWarps], far[kWarps];
  __shared__ int far_row[kWarps];
  const int segment = blockIdx.x, h = blockIdx.y, width = p.width();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, per_lane = width / kWarp;
  const int begin = p.segments[segment], size = p.segments[segment + 1] - begin;
  const int stride = max(1, size / kDirectionRows), rows = (size + stride - 1) / stride;
  const std::int32_t* order = p.order + static_cast<std::int64_t>(h) * p.indexed + begin;
  const auto load = [&](int row, float* y) {
    const float* from = coordinates_of(p, h, order[row * stride]);
    for (int j = 0; j < per_lane; ++j) y[j] = from[j * kWarp + lane];
  };
  // rows_sum -> out, in the order of the warps.
  const auto gather = [&](float* out, float scale) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) {
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += rows_sum[w][threadIdx.x];
      out[threadIdx.x] = sum * scale;
    }
    __syncthreads();
  };

  // 1.
  float y[kMost], sum[kMost] = {};
  for (int row = warp; row < rows; row += kWarps) {
    load(row, y);
    for (int j = 0; j < per_lane; ++j) sum[j] += y[j];
  }
  for (int j = 0; j < per_lane; ++j) rows_sum[warp][j * kWarp + lane] = sum[j];
  gather(mean, 1.0f / static_cast<float>(rows));

  // 2.
  float farthest = -1.0f;
  int which = 0;
  for (int row = warp; row < rows; row += kWarps) {
    load(row, y);
    float distance = 0.0f;
    for (int j = 0; j < per_lane; ++j) {
      const float delta = y[j] - mean[j * kWarp + lane];
      distance += delta * delta;
    }
    distance = warp_sum(distance);
    if (distance > farthest) {
      farthest = distance;
      which = row;
    }
  }
  which = farthest_row<Threads>(farthest, which, far, far_row);
  if (warp == 0) {
    load(which, y);
    for (int j = 0; j < per_lane; ++j) {
      direction[j * kWarp + lane] = y[j] - mean[j * kWarp + lane];
    }
  }
  __syncthreads();

  // 3.
  for (int iteration = 0; iteration < kPowerSteps; ++iteration) {
    float own[kMost], length = 0.0f, offset = 0.0f;
    for (int j = 0; j < per_lane; ++j) {
      own[j] = direction[j * kWarp + lane];
      length += own[j] * own[j];
    }
    length = warp_sum(length);
    if (!(length > 0.0f)) break;  // the same in every warp
    const float scale = rsqrtf(length);
    for (int j = 0; j < per_lane; ++j) {
      own[j] *= scale;
      offset += own[j] * mean[j * kWarp + lane];
      sum[j] = 0.0f;
    }
    offset = warp_sum(offset);
    float total = 0.0f;
    for (int row = warp; row < rows; row += kWarps) {
      load(row, y);
      float along = 0.0f;
      for (int j = 0; j < per_lane; ++j) along += own[j] * y[j];
      along = warp_sum(along) - offset;
      for (int j = 0; j < per_lane; ++j) sum[j] += along * y[j];
      total += along;
    }
    for (int j = 0; j < per_lane; ++j) rows_sum[warp][j * kWarp + lane] = sum[j];
    if (lane == 0) totals[warp] = total;
    gather(direction, 1.0f);
    total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += totals[w];
    if (static_cast<int>(threadIdx.x) < width) direction[threadIdx.x] -= total * mean[threadIdx.x];
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < width) {
    p.directions[(static_cast<std::int64_t>(h) * p.segment_count + segment) * width + threadIdx.x] =
        direction[threadIdx.x];
  }
}

// (head, segment, projection) of every token, to be sorted.
static __global__ void __launch_bounds__(kBuildBlock) projection_kernel(const BuildParams p) {
  const int h = blockIdx.y, width = p.width();
  for (int i = blockIdx.x * kBuildBlock + threadIdx.x; i < p.indexed;
       i += gridDim.x * kBuildBlock) {
    int low = 0, high = p.segment_count;  // the last segment that begins at or before i
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (p.segments[middle] <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const std::int64_t at = static_cast<std::int64_t>(h) * p.indexed + i;
    const float4* y = reinterpret_cast<const float4*>(coordinates_of(p, h, p.order[at]));
    const float4* direction = reinterpret_cast<const float4*>(
        p.directions + (static_cast<std::int64_t>(h) * p.segment_count + low) * width);
    float along = 0.0f;
    for (int j = 0; j < width / 4; ++j) {
      const float4 a = y[j], b = direction[j];
      along += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
    }
    p.sort_keys[at] =
        static_cast<unsigned long long>(h * p.segment_count + low) << 32 | ordered(along);
  }
}

// A block for each far-field node: codes, mean and host pages of its tokens.
template <typename T>
__global__ void __launch_bounds__(kBuildBlock) lay_out_kernel(const BuildParams p) {
  constexpr int kMaxNode = 64;
  __shared__ std::int32_t tokens[kMaxNode];
  const StepShape& s = p.shape;
  const int node = blockIdx.x, h = blockIdx.y, x = p.first_pair + h, d = s.head_dim;
  const int thread = threadIdx.x, begin = node * s.far_node_tokens;
  const int count = min(s.far_node_tokens, p.indexed - begin);
  for (int i = thread; i < count; i += kBuildBlock) {
    tokens[i] = p.order[static_cast<std::int64_t>(h) * p.indexed + begin + i];
  }
  __syncthreads();
  const float* low = p.layer.low + static_cast<std::int64_t>(x) * s.rank;
  const float* step = p.layer.step + static_cast<std::int64_t>(x) * s.rank;
  std::uint32_t* codes = codes_of(s, p.layer, x, begin);  // a node is in one chunk
  for (int i = thread; i < count * s.words(); i += kBuildBlock) {
    const int w = i % s.words() * kCodesPerWord;
    const float* y = coordinates_of(p, h, tokens[i / s.words()]) + w;
    codes[i] = pack_codes(y, low + w, step + w);
  }
  for (int i = thread; i < count; i += kBuildBlock) row_of(s, p.layer, x, begin + i) = -1;
  const T* keys = static_cast<const T*>(p.keys) + h * p.key_head + s.sink_tokens * p.key_token;
  const T* values =
      static_cast<const T*>(p.values) + h * p.value_head + s.sink_tokens * p.value_token;
  const int vectors = d / Vector<T>::kCount;
  for (int i = thread; i < count * vectors; i += kBuildBlock) {
    const int slot = i / vectors, v = i % vectors;
    uint4* page = reinterpret_cast<uint4*>(page_of(s, p.layer, x, begin + slot));
    const int at = slot % s.page_size * vectors + v;
    page[at] = vectors_of(keys + tokens[slot] * p.key_token)[v];
    page[s.page_size * vectors + at] = vectors_of(values + tokens[slot] * p.value_token)[v];
  }
  for (int i = thread; i < d; i += kBuildBlock) {
    float sum = 0.0f;
    for (int slot = 0; slot < count; ++slot)
      sum += to_float(values[tokens[slot] * p.value_token + i]);
    mean_of<T>(s, p.layer, x, node, d)[i] = from_float<T>(sum / static_cast<float>(count));
    if (begin + count == p.indexed) p.layer.open_sum[static_cast<std::int64_t>(x) * d + i] = sum;
  }
}

// Sink and window rows.
template <typename T>
__global__ void __launch_bounds__(kBuildBlock) near_kernel(const BuildParams p) {
  const StepShape& s = p.shape;
  const int h = blockIdx.x, x = p.first_pair + h, d = s.head_dim;
  const int vectors = d / Vector<T>::kCount, near = min(p.length, s.near_rows());
  const T* keys = static_cast<const T*>(p.keys) + h * p.key_head;
  const T* values = static_cast<const T*>(p.values) + h * p.value_head;
  const std::int64_t row0 = static_cast<std::int64_t>(x) * s.rows();
  for (int i = threadIdx.x; i < near * vectors; i += kBuildBlock) {
    const int e = i / vectors, v = i % vectors;
    const int token = e < s.sink_tokens ? e : p.length - near + e;  // near < all: a full window
    const int row =
        token < s.sink_tokens ? token : s.sink_tokens + (token - s.sink_tokens) % s.window_tokens;
    const std::int64_t to = (row0 + row) * vectors + v;
    static_cast<uint4*>(p.layer.row_keys)[to] = vectors_of(keys + token * p.key_token)[v];
    static_cast<uint4*>(p.layer.row_values)[to] = vectors_of(values + token * p.value_token)[v];
  }
  // The ring of queries, full from the start: of a short prompt some stand there twice.
  const int group = s.group;
  uint4* recent = static_cast<uint4*>(p.layer.recent_queries) +
                  static_cast<std::int64_t>(x) * group * kRecentQueries * vectors;
  for (int i = threadIdx.x; i < group * kRecentQueries * vectors; i += kBuildBlock) {
    const int g = i / (kRecentQueries * vectors), slot = i / vectors % kRecentQueries;
    // Slot t % kRecentQueries holds token t; counted back from the last one.
    const int back = (p.length - 1 - slot + kRecentQueries) % kRecentQueries % p.query_tokens;
    const T* query = static_cast<const T*>(p.queries) + (h * group + g) * p.query_head +
                     (p.query_tokens - 1 - back) * p.query_token;
    recent[i] = vectors_of(query)[i % vectors];
  }
  if (threadIdx.x == 0) {
    p.layer.lengths[x] = p.length;
    // See KeepParams; or the first of the tokens that extents hold by now.
    const int resident = p.layer.resident[x];
    p.layer.resident[x] = resident == ~p.length ? p.length : min(resident, p.length);
  }
}

}  // namespace icecache::gpu
