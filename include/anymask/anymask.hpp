// anymask: flash attention under any mask. The whole C++ API.
#pragma once

#include "anymask/attention.hpp"
#include "anymask/cuda.hpp"
#include "anymask/error.hpp"
#include "anymask/mask.hpp"
#include "anymask/plan.hpp"
#include "anymask/types.hpp"
