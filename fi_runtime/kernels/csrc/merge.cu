// One result from those of the parts of a context.
#include "common.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // parts that are read at the same time

// A few lanes for each token's head, 16 bytes of it each. The weight of a part is 2 to the power of
// its sum, which is a logarithm.
template <typename T>
__global__ void merge(const T* parts, const float* sums, const int32_t* starts, T* out,
                      float* out_sums, int rows, int heads, int lanes) {
  wait_for_kernels_before(parts, sums, starts, out, out_sums);
  constexpr int kEach = 16 / sizeof(T);
  using Piece = Vector<T, kEach>;
  const int lane = threadIdx.x % lanes;
  const int row = blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  if (row < rows) {
    const int token = row / heads, head = row % heads;
    const int first = read_fresh(starts + token), end = read_fresh(starts + token + 1);
    const auto* pieces = reinterpret_cast<const Piece*>(parts) + lane;
    float largest = -INFINITY, total = 0, merged[kEach] = {};
    for (int part = first; part < end; part += kAtOnce) {
      float sum[kAtOnce];
      Piece piece[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        sum[i] = -INFINITY;
        piece[i] = {};
        if (part + i < end) {
          const int64_t at = static_cast<int64_t>(part + i) * heads + head;
          sum[i] = read_fresh(sums + at);
          piece[i] = read_fresh(pieces + at * lanes);
        }
      }
      const float before = largest;
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) largest = fmaxf(largest, sum[i]);
      // Where no part has seen a key, nothing has a weight.
      const float unit = largest == -INFINITY ? 0 : largest;
      const float scale = exp2f(before - unit);
      total *= scale;
#pragma unroll
      for (int e = 0; e < kEach; e++) merged[e] *= scale;
#pragma unroll
      for (int i = 0; i < kAtOnce; i++) {
        const float weight = exp2f(sum[i] - unit);
        total += weight;
#pragma unroll
        for (int e = 0; e < kEach; e++) merged[e] += weight * to_float(piece[i].element[e]);
      }
    }
    Piece result;
#pragma unroll
    for (int e = 0; e < kEach; e++)
      result.element[e] = from_float<T>(total > 0 ? merged[e] / total : 0);
    reinterpret_cast<Piece*>(out)[static_cast<int64_t>(row) * lanes + lane] = result;
    if (out_sums && lane == 0) out_sums[row] = total > 0 ? log2f(total) + largest : -INFINITY;
  }
  let_next_kernel_begin();
}

template <typename T>
void launch_merge(TensorView parts, TensorView sums, TensorView starts, TensorView out,
                  Optional<TensorView> out_sums) {
  const int heads = out.size(1), rows = out.size(0) * heads;
  const int lanes = out.size(2) * sizeof(T) / 16;
  const int rows_of_block = kThreads / lanes;
  launch(merge<T>, dim3((rows + rows_of_block - 1) / rows_of_block), kThreads,
         get_stream(out.device()), data<T>(parts), data<float>(sums), data<int32_t>(starts),
         data<T>(out), data<float>(out_sums), rows, heads, lanes);
}

}  // namespace

void merge_parts(TensorView parts, TensorView sums, TensorView starts, TensorView out,
                 Optional<TensorView> out_sums) {
  CHECK_INPUT(parts);
  CHECK_INPUT(sums);
  CHECK_INPUT(starts);
  CHECK_INPUT(out);
  const int bytes = out.size(2) * get_element_size(out);
  TVM_FFI_ICHECK(bytes % 16 == 0 && kThreads % (bytes / 16) == 0)
      << "heads must be of 16 bytes times a power of two";
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(out.dtype(), T, [&] {
    launch_merge<T>(parts, sums, starts, out, out_sums);
    return true;
  });
}

}  // namespace fi_runtime
