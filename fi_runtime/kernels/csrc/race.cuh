// What drawing takes: how tokens race, and how a row of logits is read.
//
// Each token runs a race: its time is exponential with its weight as the rate, and the first has won
// with a probability of its share of all weights. That is the token of the greatest
// logit / temperature - log(e), e exponential with rate 1, so that no sum over the row is needed. e
// is a hash of the row's key and the token. At temperature 0 the greatest logit wins.
#pragma once

#include "common.cuh"

namespace fi_runtime {

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

// In the order of the numbers, and never 0 for one.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Larger for larger scores and, of equal ones, for the first token; never 0.
__device__ __forceinline__ unsigned long long ranked(float score, unsigned token) {
  return static_cast<unsigned long long>(ordered(score)) << 32 | ~token;
}

__device__ __forceinline__ int token_of(unsigned long long rank) {
  // A row without a number in it, which no model should give, has its first token.
  return rank == 0 ? 0 : static_cast<int>(~rank & 0xffffffffu);
}

// Below the first float32 scores could overflow; the likeliest token has all the weight long before.
// Beyond the second one over it is 0 in float32, which times the -inf of a token that is ruled out is
// no number; all others are as likely long before.
constexpr float kLeastTemperature = 1e-5f, kMostTemperature = 1e30f;

// What logits are multiplied with.
__device__ __forceinline__ float scale_of(float temperature) {
  return 1.f / fminf(fmaxf(temperature, kLeastTemperature), kMostTemperature);
}

constexpr int kEach = 8;  // logits that a thread reads at a time

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

// Calls take(logit, token) for every number of a row that is this thread's: those of the first
// kEach, then those `step` after them.
template <typename T, typename Take>
__device__ __forceinline__ void for_each(const T* row, int vocab, int first, int step, Take take) {
  const bool aligned = reinterpret_cast<uintptr_t>(row) % sizeof(uint4) == 0;
  for (int begin = first; begin < vocab; begin += step) {
    if (aligned && begin + kEach <= vocab) {
      const Vector<T, kEach> some = read_some(row + begin);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float logit = to_float(some.element[i]);
        if (!isnan(logit)) take(logit, begin + i);
      }
    } else {
      for (int i = begin; i < min(begin + kEach, vocab); ++i) {
        const float logit = to_float(read_fresh(row + i));
        if (!isnan(logit)) take(logit, i);
      }
    }
  }
}

__device__ __forceinline__ unsigned long long max_of_warp(unsigned long long x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}

// Calls run with a value of the type that the logits have.
template <typename Run>
void for_type_of(TensorView logits, Run run) {
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
