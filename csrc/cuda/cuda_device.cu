#include "cuda/device.h"

#include <utility>

#include "cuda/cuda_info.h"
#include "cuda/gpu.h"
#include "cuda/launch.h"

namespace icecache::gpu {
namespace {

cudaStream_t native(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw CudaError(
      message(call, " failed: ", cudaGetErrorName(status), " (", cudaGetErrorString(status), ")"));
}

bool can_chain() {
  return attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
}

int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}

DeviceScope::DeviceScope(int device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ == device) {
    before_ = -1;
  } else {
    check(cudaSetDevice(device), "cudaSetDevice");
  }
}

DeviceScope::~DeviceScope() {
  if (before_ >= 0) cudaSetDevice(before_);
}

Buffer::Buffer(std::size_t bytes, Stream stream) : bytes_(bytes), stream_(stream) {
  if (bytes == 0) return;
  void* memory = nullptr;
  const cudaError_t status = cudaMallocAsync(&memory, bytes, native(stream));
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: the device goes on
    throw OutOfPages(message("the device has no ", bytes, " bytes of memory left (",
                             memory_info().free,
                             " are free); lower max_tokens, the batch, device_pages or "
                             "device_tokens"));
  }
  check(status, "cudaMallocAsync");
  data_ = static_cast<std::byte*>(memory);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      stream_(other.stream_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(stream_, other.stream_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr) cudaFreeAsync(data_, native(stream_));
}

OwnStream::OwnStream() {
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  stream_ = stream;
}

OwnStream::~OwnStream() {
  cudaStreamSynchronize(native(stream_));
  cudaStreamDestroy(native(stream_));
}

Event::Event() {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  event_ = event;
}

Event::~Event() {
  cudaEventDestroy(static_cast<cudaEvent_t>(event_));
}

void Event::record(Stream stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(event_), native(stream)), "cudaEventRecord");
}

void Event::wait_on(Stream stream) const {
  check(cudaStreamWaitEvent(native(stream), static_cast<cudaEvent_t>(event_), 0),
        "cudaStreamWaitEvent");
}

void copy_to_device(void* device, const void* host, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, native(stream)),
        "cudaMemcpyAsync to the device");
}

void copy_to_host(void* host, const void* device, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, native(stream)),
        "cudaMemcpyAsync to the host");
}

void copy_on_device(void* to, const void* from, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, native(stream)),
        "cudaMemcpyAsync on the device");
}

void fill(void* device, int byte, std::size_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(device, byte, bytes, native(stream)), "cudaMemsetAsync");
}

void synchronize(Stream stream) {
  check(cudaStreamSynchronize(native(stream)), "cudaStreamSynchronize");
}

void synchronize_device() noexcept {
  cudaDeviceSynchronize();
}

void check_stream(Stream stream, int device) {
  if (stream == nullptr) return;
  int of_stream = device;
  check(cudaStreamGetDevice(native(stream), &of_stream), "cudaStreamGetDevice");
  if (of_stream != device) {
    throw InvalidArgument(
        message("stream must belong to device ", device, ", got one of device ", of_stream));
  }
}

MemoryInfo memory_info() {
  MemoryInfo info;
  return cudaMemGetInfo(&info.free, &info.total) == cudaSuccess ? info : MemoryInfo();
}

}  // namespace icecache::gpu

namespace icecache {

namespace {

// While it lives, a capture of another thread does not forbid what this thread does, which takes no
// part in it.
class BesideCaptures {
 public:
  BesideCaptures() noexcept { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

std::byte* allocate_pinned(std::size_t bytes) noexcept {
  const BesideCaptures beside;
  void* memory = nullptr;
  if (cudaHostAlloc(&memory, bytes, cudaHostAllocPortable | cudaHostAllocMapped) == cudaSuccess) {
    return static_cast<std::byte*>(memory);
  }
  cudaGetLastError();
  return nullptr;
}

void free_pinned(std::byte* memory) noexcept {
  if (memory == nullptr) return;
  const BesideCaptures beside;
  cudaFreeHost(memory);
}

CudaInfo cuda_info() noexcept {
  CudaInfo info;
  info.built = true;
  int version = 0;
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) {
    info.runtime_version =
        std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  }
  const cudaError_t status = cudaGetDeviceCount(&info.devices);
  if (status != cudaSuccess) {
    cudaGetLastError();
    info.devices = 0;
    info.message = std::string("no CUDA device can be used: ") + cudaGetErrorString(status);
  } else if (info.devices == 0) {
    info.message = "this machine has no CUDA device";
  }
  return info;
}

}  // namespace icecache
