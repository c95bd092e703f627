#include "icecache/types.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "icecache/error.h"

namespace icecache::types_test {
namespace {

CacheShape small_shape() {
  CacheShape shape;
  shape.num_layers = 2;
  shape.num_q_heads = 9;
  shape.num_kv_heads = 3;
  shape.head_dim = 64;
  return shape;
}

// The message that validate() refuses `shape` with; empty where it accepts.
std::string refusal(const CacheShape& shape) {
  try {
    shape.validate();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::kFloat32), 4u);
  EXPECT_EQ(size_of(DType::kBFloat16), 2u);
  EXPECT_EQ(size_of(DType::kFloat16), 2u);
  EXPECT_STREQ(name_of(DType::kFloat32), "float32");
  EXPECT_STREQ(name_of(DType::kBFloat16), "bfloat16");
  EXPECT_STREQ(name_of(DType::kFloat16), "float16");
}

TEST(CacheShape, ScaleDefaultsToInverseRootOfHeadDim) {
  CacheShape shape = small_shape();
  EXPECT_FLOAT_EQ(shape.softmax_scale(), 0.125f);
  shape.scale = 0.5f;
  EXPECT_FLOAT_EQ(shape.softmax_scale(), 0.5f);
}

TEST(CacheShape, AcceptsEverySupportedHeadDimAndGroup) {
  CacheShape shape = small_shape();
  for (int dim = 8; dim <= kMaxHeadDim; dim += 8) {
    shape.head_dim = dim;
    EXPECT_EQ(refusal(shape), "");
  }
  for (int group = 1; group <= kMaxGroup; ++group) {
    shape.num_q_heads = group * shape.num_kv_heads;
    EXPECT_EQ(refusal(shape), "");
    EXPECT_EQ(shape.group(), group);
  }
}

TEST(CacheShape, RefusesHeadDimsOutsideTheListByValueAndLimit) {
  CacheShape shape = small_shape();
  for (const int dim : {-8, 0, 4, 12, 63, 513, 520}) {
    shape.head_dim = dim;
    const std::string text = refusal(shape);
    EXPECT_NE(text.find("head_dim"), std::string::npos) << text;
    EXPECT_NE(text.find("512"), std::string::npos) << text;
    EXPECT_NE(text.find("got " + std::to_string(dim)), std::string::npos) << text;
  }
}

TEST(CacheShape, RefusesHeadCountsThatDoNotGroup) {
  CacheShape shape = small_shape();
  shape.num_q_heads = 10;
  EXPECT_NE(refusal(shape).find("num_q_heads must be a positive multiple of num_kv_heads (3)"),
            std::string::npos);
  shape.num_q_heads = 0;
  EXPECT_NE(refusal(shape), "");
  shape.num_q_heads = 3 * (kMaxGroup + 1);
  EXPECT_NE(refusal(shape).find("at most 128, got 387 / 3 = 129"), std::string::npos);
  shape.num_kv_heads = 0;
  EXPECT_NE(refusal(shape).find("num_kv_heads"), std::string::npos);
}

TEST(CacheShape, RefusesNoLayersAndImpossibleScales) {
  CacheShape shape = small_shape();
  shape.num_layers = 0;
  EXPECT_NE(refusal(shape).find("num_layers must be from 1 to 1024, got 0"), std::string::npos);
  shape = small_shape();
  for (const float scale :
       {-1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    shape.scale = scale;
    EXPECT_NE(refusal(shape).find("scale"), std::string::npos) << scale;
  }
}

TEST(CacheShape, RefusesUnknownDType) {
  CacheShape shape = small_shape();
  shape.dtype = static_cast<DType>(7);
  EXPECT_NE(refusal(shape).find("dtype must be float32, bfloat16 or float16, got code 7"),
            std::string::npos);
}

TEST(TensorView, AddressesByStridesInElements) {
  std::vector<std::uint16_t> storage(2 * 3 * 8);
  TensorView view{storage.data(), DType::kBFloat16, 2, 3, 8, 24, 8};
  EXPECT_EQ(view.at(0, 0), reinterpret_cast<std::byte*>(storage.data()));
  EXPECT_EQ(view.at(1, 2), reinterpret_cast<std::byte*>(storage.data() + 24 + 16));
}

}  // namespace
}  // namespace icecache::types_test
