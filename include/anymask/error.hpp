// What anymask throws. Every message names the argument, what it got and what it needs.
#pragma once

#include <stdexcept>

namespace anymask {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A shape, size, range, stride or alignment that does not fit (ValueError in Python).
struct InvalidValue : Error {
  using Error::Error;
};
// A data type or device that does not fit (TypeError in Python).
struct InvalidType : Error {
  using Error::Error;
};
// A right request that this build or machine cannot serve (NotImplementedError in Python).
struct Unsupported : Error {
  using Error::Error;
};
// The machine failed: out of memory, driver, compiler, file system (RuntimeError in Python).
struct RuntimeFailure : Error {
  using Error::Error;
};

}  // namespace anymask
