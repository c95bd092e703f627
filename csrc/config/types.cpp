#include "icecache/types.h"

#include <cmath>

#include "icecache/error.h"

namespace icecache {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt8:
      return "int8";
  }
  return "unknown";
}

float CacheShape::softmax_scale() const {
  return scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(head_dim));
}

void CacheShape::validate() const {
  if (num_layers < 1 || num_layers > kMaxLayers) {
    throw InvalidArgument(
        message("num_layers must be from 1 to ", kMaxLayers, ", got ", num_layers));
  }
  if (num_kv_heads < 1 || num_kv_heads > kMaxKvHeads) {
    throw InvalidArgument(
        message("num_kv_heads must be from 1 to ", kMaxKvHeads, ", got ", num_kv_heads));
  }
  if (num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
    throw InvalidArgument(message("num_q_heads must be a positive multiple of num_kv_heads (",
                                  num_kv_heads, "), got ", num_q_heads));
  }
  if (group() > kMaxGroup) {
    throw InvalidArgument(message("num_q_heads / num_kv_heads must be at most ", kMaxGroup,
                                  ", got ", num_q_heads, " / ", num_kv_heads, " = ", group()));
  }
  if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
    throw InvalidArgument(
        message("head_dim must be a multiple of 8 from 8 to ", kMaxHeadDim, ", got ", head_dim));
  }
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    throw InvalidArgument(
        message("dtype must be float32, bfloat16 or float16, got code ", static_cast<int>(dtype)));
  }
  if (!std::isfinite(scale) || scale < 0.0f) {
    throw InvalidArgument(
        message("scale must be finite and positive, or 0 for 1 / sqrt(head_dim), got ", scale));
  }
  if (!std::isfinite(logit_softcap) || logit_softcap < 0.0f) {
    throw InvalidArgument(
        message("logit_softcap must be finite and positive, or 0 for none, got ", logit_softcap));
  }
}

}  // namespace icecache
