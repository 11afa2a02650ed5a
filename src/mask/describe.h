// Words for error messages.
#pragma once

#include <string>

#include "anymask/error.hpp"
#include "anymask/types.hpp"

namespace anymask {

// "[2, 128, 8, 64]"
std::string shape_text(const Tensor& tensor);
std::string shape_text(std::initializer_list<int64_t> shape);
// "cpu", "cuda:1"
std::string device_text(Device device);

// `name` has the wrong shape: says what it is and what is needed.
[[noreturn]] void fail_shape(const std::string& name, const Tensor& got, const std::string& needed);
[[noreturn]] void fail_dtype(const std::string& name, DType got, const std::string& needed);

}  // namespace anymask
