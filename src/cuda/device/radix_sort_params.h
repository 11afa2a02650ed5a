// The shape of a radix sort: shared by the hosts that launch it and the device code.
#pragma once

#include "rules/common.h"

namespace anymask::cuda {

inline constexpr int kDigits = 256;  // eight bits a pass
inline constexpr int kSortWarps = 32;
inline constexpr int kSortThreads = 32 * kSortWarps;

}  // namespace anymask::cuda
