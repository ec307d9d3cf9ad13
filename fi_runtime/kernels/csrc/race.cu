// Draws a token of each row in one pass over the logits.
//
// Each token runs a race: its time is exponential with its weight as the rate, and the first has won
// with a probability of its share of all weights. That is the token of the greatest
// logit / temperature - log(e), e exponential with rate 1, so that no sum over the row is needed. e
// is a hash of the row's key and the token. At temperature 0 the greatest logit wins.
#include "common.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 256;
constexpr int kEach = 8;  // logits that a thread reads at a time
constexpr int kChunk = kThreads * kEach;

// A permutation of 32-bit numbers with little bias: Wellons, "Prospecting for Hash Functions", 2018.
__device__ __forceinline__ unsigned mix(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// log(e): exact where e is small, since small ones win.
__device__ __forceinline__ float log_of_time(unsigned token, unsigned low, unsigned high) {
  const float share = (static_cast<float>(mix(mix(token ^ low) ^ high)) + 0.5f) * 0x1p-32f;
  const float time = share < 0x1p-7f ? share * (1.f + share * (0.5f + share * (1.f / 3.f)))
                                     : -__logf(1.f - share);
  return __logf(time);
}

// Larger for larger scores and, of equal ones, for the first token; never 0.
__device__ __forceinline__ unsigned long long ranked(float score, unsigned token) {
  unsigned bits = __float_as_uint(score);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(bits) << 32 | ~token;
}

template <typename T>
__device__ __forceinline__ Vector<T, kEach> read_some(const T* at) {
  Vector<T, kEach> some;
  constexpr int kPart = sizeof(uint4) / sizeof(T);
#pragma unroll
  for (int part = 0; part < kEach / kPart; ++part)
    reinterpret_cast<uint4*>(&some)[part] =
        read_fresh(reinterpret_cast<const uint4*>(at + part * kPart));
  return some;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    race(const T* logits, const double* temperatures, const int64_t* keys, const int64_t* slots,
         int64_t* last_tokens,
         int64_t* chosen, unsigned long long* best, unsigned* finished, int vocab, int64_t stride) {
  const int row = blockIdx.y;
  wait_for_kernels_before(logits, temperatures, keys, slots);
  const float temperature = temperatures[row];
  const bool drawn = temperature > 0.f;
  // Below it float32 scores could overflow; the likeliest token has all the weight long before.
  const float scale = drawn ? 1.f / fmaxf(temperature, 1e-5f) : 1.f;
  const uint64_t key = keys[row];
  const unsigned low = key, high = key >> 32;
  const T* own = logits + row * stride;
  unsigned long long top = 0;
  auto enter = [&](float logit, int token) {
    if (isnan(logit)) return;
    float score = logit * scale;
    if (drawn) score -= log_of_time(token, low, high);
    top = max(top, ranked(score, token));
  };
  using Some = Vector<T, kEach>;
  const bool aligned = reinterpret_cast<uintptr_t>(own) % sizeof(Some) == 0;
  for (int begin = (blockIdx.x * kThreads + threadIdx.x) * kEach; begin < vocab;
       begin += gridDim.x * kChunk) {
    if (aligned && begin + kEach <= vocab) {
      const Some some = read_some(own + begin);
#pragma unroll
      for (int i = 0; i < kEach; ++i) enter(to_float(some.element[i]), begin + i);
    } else {
      for (int i = begin; i < min(begin + kEach, vocab); ++i) enter(to_float(read_fresh(own + i)), i);
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    top = max(top, __shfl_xor_sync(0xffffffff, top, step));
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
    const unsigned long long winner = atomicExch(best + row, 0ull);
    finished[row] = 0;
    // A row without a number in it, which no model should give, has its first token.
    const int64_t token = winner == 0 ? 0 : static_cast<unsigned>(~winner);
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
  auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(race<T>, dim3(blocks, rows), kThreads, get_stream(logits.device()), data<T>(logits),
           data<double>(temperatures), data<int64_t>(keys), data<int64_t>(slots),
           data<int64_t>(last_tokens), data<int64_t>(chosen), data<unsigned long long>(scratch),
           reinterpret_cast<unsigned*>(data<int64_t>(scratch) + scratch.stride(0)), vocab,
           logits.stride(0));
  };
  if (encode_dlpack_dtype(logits.dtype()) == float32_code) {
    run(float{});
  } else {
    DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(logits.dtype(), T, [&] {
      run(T{});
      return true;
    });
  }
}

}  // namespace fi_runtime
