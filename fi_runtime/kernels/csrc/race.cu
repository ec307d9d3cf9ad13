// Draws a token of each row in one pass over the logits.
#include "race.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kChunk = kThreads * kEach;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    race(const T* logits, const double* temperatures, const int64_t* keys, const int64_t* slots,
         int64_t* last_tokens, int64_t* chosen, unsigned long long* best, unsigned* finished,
         int vocab, int64_t stride) {
  const int row = blockIdx.y;
  wait_for_kernels_before(logits, temperatures, keys, slots);
  const float temperature = temperatures[row];
  const bool drawn = temperature > 0.f;
  const float scale = drawn ? scale_of(temperature) : 1.f;
  const uint64_t key = keys[row];
  const unsigned low = key, high = key >> 32;
  unsigned long long top = 0;
  const int first = (blockIdx.x * kThreads + threadIdx.x) * kEach;
  for_each(logits + row * stride, vocab, first, gridDim.x * kChunk, [&](float logit, int token) {
    float score = logit * scale;
    if (drawn) score -= log_of_time(token, low, high);
    top = max(top, ranked(score, token));
  });
  top = max_of_warp(top);
  __shared__ unsigned long long tops[kThreads / kWarp];
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = top;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) top = max(top, tops[warp]);
  atomicMax(best + row, top);
  __threadfence();
  // The last block of a row sees what all of them found, and leaves both as it found them.
  if (atomicAdd(finished + row, 1u) + 1 == gridDim.x) {
    __threadfence();
    const int64_t token = token_of(atomicExch(best + row, 0ull));
    finished[row] = 0;
    chosen[row] = token;
    last_tokens[slots[row]] = token;
  }
  let_next_kernel_begin();
}

}  // namespace

// scratch: (2, at least as many rows), int64, of zeros, and left so.
void race_tokens(TensorView logits, TensorView temperatures, TensorView keys, TensorView slots,
                 TensorView last_tokens, TensorView chosen, TensorView scratch) {
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(logits);
  const int rows = logits.size(0), vocab = logits.size(1);
  TVM_FFI_ICHECK(scratch.size(1) >= rows && chosen.size(0) >= rows) << "too few rows";
  int processors;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, logits.device().device_id);
  const int most = (vocab + kChunk - 1) / kChunk;
  const int blocks = std::max(1, std::min(most, (8 * processors + rows - 1) / rows));
  for_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    launch(race<T>, dim3(blocks, rows), kThreads, get_stream(logits.device()), data<T>(logits),
           data<double>(temperatures), data<int64_t>(keys), data<int64_t>(slots),
           data<int64_t>(last_tokens), data<int64_t>(chosen), data<unsigned long long>(scratch),
           reinterpret_cast<unsigned*>(data<int64_t>(scratch) + scratch.stride(0)), vocab,
           logits.stride(0));
  });
}

}  // namespace fi_runtime
