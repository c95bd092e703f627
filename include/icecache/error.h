// Every error that a user can cause is one of these; the library never exits or aborts.
// The Python bindings map InvalidArgument to ValueError and the others to RuntimeError subclasses.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace icecache {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A parameter or an input that is not supported: names it, what was expected, what came.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

// The page pool is exhausted. Nothing was changed; other sequences go on.
class OutOfPages : public Error {
 public:
  using Error::Error;
};

// A page is not what its owner wrote: stale, foreign or altered memory.
class IntegrityError : public Error {
 public:
  using Error::Error;
};

// A call to CUDA failed: names the call, CUDA's name for the error and its text. What was launched
// before it on the same device may not have run.
class CudaError : public Error {
 public:
  using Error::Error;
};

// A part that was left out of this build (CUDA, FAISS): says how to get it.
class Unavailable : public Error {
 public:
  using Error::Error;
};

// message("head_dim must be <= ", 256, ", got ", d)
template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace icecache
