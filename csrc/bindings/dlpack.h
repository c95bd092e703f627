// The part of DLPack's C exchange API (version 1.3) that lends the memory of a Python tensor to C++
// without a header of torch: https://dmlc.github.io/dlpack/latest/c_api.html. Layouts are an ABI.
#pragma once

#include <cstdint>

namespace icecache::bindings::dlpack {

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";  // of the tensor's type
constexpr const char* kCapsule = "dlpack_exchange_api";          // name of the capsule in it
constexpr std::uint32_t kMajor = 1;

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : std::uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Device {
  std::int32_t type, index;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t dims;
  DataType dtype;
  std::int64_t* shape;    // the tensor's own, as `strides`
  std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

// Functions return 0, or -1 with a Python error set. The GIL must be held.
struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  void* export_owned;
  void* import_owned;
  int (*borrow)(void* py_object, Tensor* out);  // valid while the Python tensor is not changed
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** out);
};

}  // namespace icecache::bindings::dlpack
