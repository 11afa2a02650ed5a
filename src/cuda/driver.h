// The CUDA driver, opened at run time: typed functions, checked calls, devices, launches.
//
// Nothing here needs a CUDA header or library at build time. The prototypes, enumerators and
// structs below are the driver's ABI, stated by hand and pinned by the static_asserts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace anymask::cuda {

// ---- the driver's vocabulary --------------------------------------------------------------------

using CuResult = int32_t;
using CuDevice = int32_t;
using CuAddress = uint64_t;
using CuContext = struct CuContextObject*;
using CuStream = struct CuStreamObject*;
using CuLibrary = struct CuLibraryObject*;
using CuKernel = struct CuKernelObject*;
using CuFunction = struct CuFunctionObject*;

inline constexpr CuResult kCuSuccess = 0;
inline constexpr CuResult kCuNoDevice = 100;

enum class CuDeviceAttribute : int32_t {
  kMultiprocessors = 16,
  kL2Bytes = 38,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedBytesOptin = 97,
};

enum class CuFunctionAttribute : int32_t {
  kSharedBytesStatic = 1,
  kLocalBytes = 3,
  kRegisters = 4,
  kMaxDynamicShared = 8,
};

enum class CuPointerAttribute : int32_t { kDeviceOrdinal = 9 };

struct CuLaunchConfig {
  uint32_t grid[3];
  uint32_t block[3];
  uint32_t shared_bytes;
  CuStream stream;
  void* attributes;  // none
  uint32_t attribute_count;
};
static_assert(sizeof(CuLaunchConfig) == 56 && offsetof(CuLaunchConfig, stream) == 32);

// ---- tensor maps: what the bulk copy engine needs to know of a tensor ---------------------------

struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

enum class TensorMapType : int32_t {
  kUint8 = 0,
  kUint32 = 2,
  kFloat16 = 6,
  kFloat32 = 7,
  kBfloat16 = 9,
};
enum class TensorMapSwizzle : int32_t { kNone, k32Bytes, k64Bytes, k128Bytes };
enum class TensorMapPromotion : int32_t { kNone, k64Bytes, k128Bytes, k256Bytes };

// Dimension 0 is the contiguous one. Elements outside the tensor read as zero.
struct TensorMapSpec {
  TensorMapType type;
  uint32_t rank;             // 1..5
  uint64_t address;          // 16-byte aligned
  uint64_t extent[5];        // elements
  uint64_t stride_bytes[5];  // of dimensions 1.. (the first entry is not read); multiples of 16
  uint32_t box[5];           // elements, at most 256 each
  TensorMapSwizzle swizzle = TensorMapSwizzle::kNone;
  TensorMapPromotion promotion = TensorMapPromotion::k256Bytes;
};

TensorMap encode_tensor_map(const TensorMapSpec& spec);

// ---- the functions ------------------------------------------------------------------------------

// Name, symbol in libcuda (some carry an ABI version), parameters.
#define ANYMASK_DRIVER_FUNCTIONS(F)                                                             \
  F(cuInit, cuInit, (uint32_t flags))                                                           \
  F(cuDriverGetVersion, cuDriverGetVersion, (int* version))                                     \
  F(cuGetErrorName, cuGetErrorName, (CuResult error, const char** text))                        \
  F(cuGetErrorString, cuGetErrorString, (CuResult error, const char** text))                    \
  F(cuDeviceGetCount, cuDeviceGetCount, (int* count))                                           \
  F(cuDeviceGet, cuDeviceGet, (CuDevice * device, int ordinal))                                 \
  F(cuDeviceGetName, cuDeviceGetName, (char* name, int length, CuDevice device))                \
  F(cuDeviceTotalMem, cuDeviceTotalMem_v2, (size_t * bytes, CuDevice device))                   \
  F(cuDeviceGetAttribute, cuDeviceGetAttribute,                                                 \
    (int* value, CuDeviceAttribute attribute, CuDevice device))                                 \
  F(cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CuContext * context, CuDevice device)) \
  F(cuCtxGetCurrent, cuCtxGetCurrent, (CuContext * context))                                    \
  F(cuCtxSetCurrent, cuCtxSetCurrent, (CuContext context))                                      \
  F(cuCtxGetDevice, cuCtxGetDevice, (CuDevice * device))                                        \
  F(cuThreadExchangeStreamCaptureMode, cuThreadExchangeStreamCaptureMode, (int* mode))          \
  F(cuStreamSynchronize, cuStreamSynchronize, (CuStream stream))                                \
  F(cuPointerGetAttribute, cuPointerGetAttribute,                                               \
    (void* value, CuPointerAttribute attribute, CuAddress pointer))                             \
  F(cuMemAlloc, cuMemAlloc_v2, (CuAddress * address, size_t bytes))                             \
  F(cuMemFree, cuMemFree_v2, (CuAddress address))                                               \
  F(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2,                                                    \
    (CuAddress to, const void* from, size_t bytes, CuStream stream))                            \
  F(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2,                                                    \
    (void* to, CuAddress from, size_t bytes, CuStream stream))                                  \
  F(cuMemsetD32Async, cuMemsetD32Async,                                                         \
    (CuAddress address, uint32_t value, size_t words, CuStream stream))                         \
  F(cuLibraryLoadData, cuLibraryLoadData,                                                       \
    (CuLibrary * library, const void* code, int32_t* jit_options, void** jit_values,            \
     uint32_t jit_count, int32_t* options, void** values, uint32_t count))                      \
  F(cuLibraryUnload, cuLibraryUnload, (CuLibrary library))                                      \
  F(cuLibraryGetKernel, cuLibraryGetKernel,                                                     \
    (CuKernel * kernel, CuLibrary library, const char* name))                                   \
  F(cuKernelGetFunction, cuKernelGetFunction, (CuFunction * function, CuKernel kernel))         \
  F(cuKernelGetAttribute, cuKernelGetAttribute,                                                 \
    (int* value, CuFunctionAttribute attribute, CuKernel kernel, CuDevice device))              \
  F(cuKernelSetAttribute, cuKernelSetAttribute,                                                 \
    (CuFunctionAttribute attribute, int value, CuKernel kernel, CuDevice device))               \
  F(cuLaunchKernelEx, cuLaunchKernelEx,                                                         \
    (const CuLaunchConfig* config, CuKernel kernel, void** parameters, void** extra))           \
  F(cuTensorMapEncodeTiled, cuTensorMapEncodeTiled,                                             \
    (TensorMap * map, TensorMapType type, uint32_t rank, void* address, const uint64_t* extent, \
     const uint64_t* stride_bytes, const uint32_t* box, const uint32_t* element_stride,         \
     int32_t interleave, TensorMapSwizzle swizzle, TensorMapPromotion promotion, int32_t fill))

struct Driver {
#define ANYMASK_DECLARE(name, symbol, parameters) CuResult(*name) parameters;
  ANYMASK_DRIVER_FUNCTIONS(ANYMASK_DECLARE)
#undef ANYMASK_DECLARE
  int version;  // 13000 for CUDA 13.0
};

// The driver, opened and initialised by the first call. Throws Unsupported, saying what is missing
// (library, a new enough driver, a GPU); a later call tries again.
const Driver& driver();

// Why driver() would throw; empty when it would not.
std::string driver_problem();

// Throws RuntimeFailure with the driver's text unless `result` is success.
void check(CuResult result, const char* what);

// Queues zeros for `bytes`, a multiple of 4, of device memory; nothing where there are none.
void clear(void* memory, int64_t bytes, CuStream stream);

// ---- devices ------------------------------------------------------------------------------------

struct Gpu {
  int ordinal;
  CuDevice handle;
  std::string name;
  int capability;  // 90 for compute capability 9.0
  int multiprocessors;
  int l2_bytes;
  int shared_bytes;  // the most that one block may have
  size_t memory_bytes;
};

// Of the largest Hopper, for what must not depend on the GPU: sizes of plans and workspaces are
// asked for where there may be none.
inline constexpr int64_t kMultiprocessors = 132;

int gpu_count();              // 0 when there is no usable driver
const Gpu& gpu(int ordinal);  // read once, then a look-up

// Makes sure that a context of `ordinal` is current on this thread; restores the caller's at the
// end. Keeps the caller's own context when it is one of that device.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  CuContext previous_ = nullptr;
  bool changed_ = false;
};

// Calls that a stream capture forbids (loading code) are let through while this lives: they touch
// no stream, so a capture on another stream or thread is not harmed.
class CaptureGuard {
 public:
  CaptureGuard();
  ~CaptureGuard();
  CaptureGuard(const CaptureGuard&) = delete;
  CaptureGuard& operator=(const CaptureGuard&) = delete;

 private:
  int mode_;
};

}  // namespace anymask::cuda
