// Tensors of torch as memory that C++ reads and writes, without a header of torch.
//
// What comes out of here is dense memory of one of the three dtypes, within the tensor's storage,
// with unit stride in D, and it lives as long as the TensorMemory: a tensor that is not of this
// form is copied where it is read and refused where it is written. Errors are InvalidArgument. The
// GIL must be held by all of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/dlpack.h"
#include "icecache/types.h"

namespace icecache::bindings {

enum class Use {
  kRead,     // during the call: a copy will do
  kInPlace,  // read as it stands, by what the call launches
  kWritten,
  kMade,  // written, and what new_like() gave
};

// What a tensor argument must be.
struct TensorForm {
  std::string_view name;
  std::string_view dims;  // "[B, H, T, D]": so many dimensions as letters
  DType dtype = DType::kFloat32;
  bool is_int32 = false;  // in place of dtype
  bool has_dim = true;    // false: one number in place of each row of D, in float32
  Use use = Use::kRead;
  std::int32_t device_type = dlpack::kCpu;
  int device = 0;
  int index = -1;  // of a list's item: the name is then "name[index]"

  int num_dims() const;
  std::string title() const;
};

// A tensor, kept alive.
class TensorMemory {
 public:
  static constexpr int kMaxDims = 4;

  TensorMemory(const TensorForm& form, pybind11::handle tensor);

  std::int64_t size(int dim) const { return shape_[dim]; }
  std::int64_t stride(int dim) const { return strides_[dim]; }
  std::byte* element(std::int64_t offset) const;
  bool is_contiguous() const;
  std::byte* end() const;  // of a contiguous one
  std::string shape_text() const;

 private:
  pybind11::object held_;
  DType dtype_;
  int dims_;
  void* data_ = nullptr;
  std::int64_t shape_[kMaxDims] = {}, strides_[kMaxDims] = {};
};

// One [H, T, D] for each sequence, and the tensors that keep them alive.
struct Rows {
  std::vector<TensorMemory> held;
  std::vector<TensorView> views;
};

bool is_tensor(pybind11::handle value);
// Of a tensor [B, H, T, D] for B = `sequences`. Here and below, D = 1 is left out where the form has
// no D.
Rows batch_rows(TensorForm form, pybind11::handle tensor, std::size_t sequences);
// The same, or of an iterable of B tensors [H, T_b, D].
Rows batch_or_list_rows(TensorForm form, pybind11::handle tensors, std::size_t sequences);
// Of a tensor [N, H, D]: rows firsts[b] up to firsts[b] + counts[b] are those of sequence b.
Rows packed_rows(TensorForm form, pybind11::handle tensor, std::span<const std::int64_t> firsts,
                 std::span<const std::int64_t> counts);

// A new tensor on the CPU of the shape and the dtype of `like`, a tensor that a TensorMemory took,
// whatever device is torch's default.
pybind11::object new_like(pybind11::handle like);
// torch's current stream on a device: a cudaStream_t, or null on the CPU.
void* current_stream(std::int32_t device_type, int device);

}  // namespace icecache::bindings
