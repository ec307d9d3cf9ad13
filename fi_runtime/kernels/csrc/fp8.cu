// Rows that are rounded to fp8 before a matrix product.
#include "common.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kEach = 4;
constexpr float kLargest = 448.f, kLeast = 1e-10f;

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  }
  return x;
}

// Each group of a row's elements by its largest. A block for a row, or a warp for each group.
template <typename T, bool kWholeRows>
__global__ void round_rows(const T* x, __nv_fp8_e4m3* codes, float* scales, int rows, int padded,
                           int groups, int size, int64_t x_stride) {
  constexpr int kTogether = kWholeRows ? kThreads : kWarp;
  using Some = Vector<T, kEach>;
  __shared__ float of_warps[kWarps];
  const int row = blockIdx.x;
  const int group = kWholeRows ? 0 : blockIdx.y * kWarps + threadIdx.x / kWarp;
  const int first = threadIdx.x % kTogether * kEach;
  wait_for_kernels_before(x, codes, scales);
  const bool there = group < groups;
  const T* from = x + row * x_stride + static_cast<int64_t>(group) * size;
  __nv_fp8_e4m3* to = codes + (static_cast<int64_t>(row) * groups + group) * size;
  float largest = kLeast;
  for (int i = first; there && row < rows && i < size; i += kTogether * kEach) {
    const Some some = read_fresh(reinterpret_cast<const Some*>(from + i));
#pragma unroll
    for (int j = 0; j < kEach; ++j) largest = fmaxf(largest, fabsf(to_float(some.element[j])));
  }
  largest = largest_of_warp(largest);
  if constexpr (kWholeRows) {
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
    __syncthreads();
    largest = largest_of_warp(of_warps[threadIdx.x % kWarps]);
  }
  const float scale = largest / kLargest;
  for (int i = first; there && i < size; i += kTogether * kEach) {
    Some some = {};
    if (row < rows) some = read_fresh(reinterpret_cast<const Some*>(from + i));
    Vector<__nv_fp8_e4m3, kEach> rounded;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      rounded.element[j] = from_float<__nv_fp8_e4m3>(to_float(some.element[j]) / scale);
    }
    *reinterpret_cast<Vector<__nv_fp8_e4m3, kEach>*>(to + i) = rounded;
  }
  if (there && first == 0) scales[static_cast<int64_t>(group) * padded + row] = scale;
  let_next_kernel_begin();
}

}  // namespace

// x: (rows, in); codes: (padded, in), e4m3; scales: (groups, padded), float32.
void round_rows(TensorView x, TensorView codes, TensorView scales) {
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(x);
  CHECK_DIM(2, x);
  const int rows = x.size(0), inputs = x.size(1), padded = codes.size(0), groups = scales.size(0);
  TVM_FFI_ICHECK(encode_dlpack_dtype(codes.dtype()) == float8_e4m3fn_code) << "codes in e4m3";
  TVM_FFI_ICHECK(inputs % (groups * kEach) == 0 && x.stride(0) % kEach == 0) << "groups of fours";
  TVM_FFI_ICHECK(rows <= padded && codes.size(1) == inputs && scales.size(1) == padded) << "shapes";
  if (padded == 0) return;
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(x.dtype(), T, [&] {
    auto run = [&](auto kernel, int blocks) {
      launch(kernel, dim3(padded, blocks), kThreads, get_stream(x.device()), data<T>(x),
             data<__nv_fp8_e4m3>(codes), data<float>(scales), rows, padded, groups,
             inputs / groups, x.stride(0));
    };
    if (groups == 1) {
      run(round_rows<T, true>, 1);
    } else {
      run(round_rows<T, false>, (groups + kWarps - 1) / kWarps);
    }
    return true;
  });
}

}  // namespace fi_runtime
