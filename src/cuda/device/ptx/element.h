// The element types of q, k, v and out. Host and device.
#pragma once

#include "rules/common.h"

namespace anymask::ptx {

enum class Element : int32_t { kBf16, kF16 };

}  // namespace anymask::ptx
