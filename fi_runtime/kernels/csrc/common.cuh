// What all kernels of a decode step share: launches that overlap, and the host's side of tensors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "tvm_ffi_utils.h"

namespace fi_runtime {

using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr int kWarp = 32;

// Programmatic dependent launch: a kernel may begin while the one before it in the stream still
// runs, and must wait before it touches what that one reads or writes. Every kernel here waits, so
// that waiting for one is waiting for all before it.
//
// RACE: whatever is read after the wait must be named here, or the compiler may read it before. For
// it the pointers are new ones afterwards, to which nothing can have been read; and reads go past
// the first-level cache (read_fresh), which may hold what an earlier kernel found there.
template <typename... T>
__device__ __forceinline__ void wait_for_kernels_before(T*&... pointers) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  (..., [&] { asm volatile("" : "+l"(pointers)::"memory"); }());
}

// The next kernel begins once every block has said so. RACE: before one of FlashInfer's, only at the
// end, since the compiler is free to move their reads above their wait.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            Arguments... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  TVM_FFI_ICHECK(status == cudaSuccess) << cudaGetErrorString(status);
}

template <typename T>
T* data(const TensorView& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
T* data(const Optional<TensorView>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor.value().data_ptr()) : nullptr;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ nv_bfloat16 from_float(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ half from_float(float x) {
  return __float2half(x);
}

template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float(float x) {
  return __nv_fp8_e4m3(x);  // what is too large becomes the largest
}

// So many elements that lie together, read and written at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T element[kCount];
};

template <typename V>
__device__ __forceinline__ V read_fresh(const V* at) {
  V value;
  if constexpr (sizeof(V) == 16) {
    *reinterpret_cast<uint4*>(&value) = __ldcg(reinterpret_cast<const uint4*>(at));
  } else if constexpr (sizeof(V) == 8) {
    *reinterpret_cast<uint2*>(&value) = __ldcg(reinterpret_cast<const uint2*>(at));
  } else if constexpr (sizeof(V) == 4) {
    *reinterpret_cast<unsigned*>(&value) = __ldcg(reinterpret_cast<const unsigned*>(at));
  } else {
    static_assert(sizeof(V) == 2);
    *reinterpret_cast<unsigned short*>(&value) =
        __ldcg(reinterpret_cast<const unsigned short*>(at));
  }
  return value;
}

template <typename V>
__device__ __forceinline__ V sum_of_warp(V x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

}  // namespace fi_runtime
