#pragma once
#include "cuda/device/sm90/backward_math.h"
namespace anymask::cuda {
template <BackwardConfig C>
struct BackwardWide;
}
