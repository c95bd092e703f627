#include "bindings/ops_kernels.h"

namespace icecache::ops {

using torch::headeronly::ScalarType;

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (std::int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

void require_tensor(const char* name, const Tensor& tensor, ScalarType dtype,
                    std::initializer_list<std::int64_t> shape) {
  std::string expected = "[";
  bool fits = tensor.dim() == static_cast<std::int64_t>(shape.size());
  std::int64_t i = 0;
  for (const std::int64_t size : shape) {
    fits = fits && (size < 0 || tensor.size(i) == size);
    expected += (i++ > 0 ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
  }
  require(fits, name, " must be ", expected, "], got ", shape_text(tensor));
  require(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
  require(tensor.is_contiguous(), name, " must be contiguous");
  // torch lets a storage shrink under its tensors.
  std::int64_t storage_bytes = 0;
  require(aoti_torch_get_storage_size(tensor.get(), &storage_bytes) == AOTI_TORCH_SUCCESS, name,
          " must have a storage");
  const auto item = static_cast<std::int64_t>(tensor.element_size());
  const std::int64_t end = (tensor.storage_offset() + tensor.numel()) * item;
  require(tensor.numel() == 0 || end <= storage_bytes, name, " must lie within its storage of ",
          storage_bytes, " bytes, got ", end);
}

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      require(false, name, " must be float32, bfloat16 or float16, got ", tensor.scalar_type());
      return DType::kFloat32;
  }
}

}  // namespace icecache::ops
