#include "mask/describe.h"

#include <algorithm>

namespace anymask {
namespace {

template <typename Iterator>
std::string list_text(Iterator begin, Iterator end) {
  std::string text = "[";
  for (Iterator it = begin; it != end; ++it) {
    if (it != begin) text += ", ";
    text += std::to_string(*it);
  }
  return text + "]";
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  return list_text(tensor.shape, tensor.shape + std::clamp(tensor.ndim, 0, 4));
}

std::string shape_text(std::initializer_list<int64_t> shape) {
  return list_text(shape.begin(), shape.end());
}

std::string device_text(Device device) {
  return device.type == DeviceType::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

void fail_shape(const std::string& name, const Tensor& got, const std::string& needed) {
  throw InvalidValue(name + " has shape " + shape_text(got) + "; it needs " + needed);
}

void fail_dtype(const std::string& name, DType got, const std::string& needed) {
  throw InvalidType(name + " has type " + name_of(got) + "; it needs " + needed);
}

}  // namespace anymask
