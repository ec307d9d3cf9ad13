// Draws a token of each row from those that its top_k, top_p and min_p leave.
//
// A filter keeps the tokens from some logit up, those that equal the last of them among them. So the
// winner of the race among what is left by all filters but top_p is looked at: if the tokens above
// it have less than top_p of what is left together, it is one of those that top_p leaves, and the
// first of them, since all others have lost to it. If not, only tokens above it can be, and the
// first of these is looked at next. Mostly that takes one look.
#include "race.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigit = 4;  // bits that are found in one pass over a row
constexpr int kDigits = (1 << kDigit) - 1;

// How many bits of an ordered number tell the numbers of a type apart.
template <typename T>
constexpr int kBits = 32;
template <>
constexpr int kBits<nv_bfloat16> = 16;
template <>
constexpr int kBits<half> = 20;

// Of a block, in an order that is always the same. All threads get the result.
template <typename V, typename Join>
__device__ V join_block(V value, V (&shared)[kWarps], Join join) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2)
    value = join(value, __shfl_xor_sync(0xffffffff, value, step));
  __syncthreads();  // others may still read what was joined before
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, shared[warp]);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    draw_filtered(const T* logits, const double* temperatures, const double* top_ks,
                  const double* top_ps, const double* min_ps, const int64_t* keys,
                  const int64_t* slots, int64_t* last_tokens, int64_t* chosen, int vocab,
                  int64_t stride) {
  __shared__ unsigned long long ranks[kWarps];
  __shared__ float masses[kWarps];
  __shared__ int counts[kDigits];
  const int row = blockIdx.x;
  wait_for_kernels_before(logits, temperatures, top_ks, top_ps, min_ps, keys, slots);
  const T* own = logits + row * stride;
  const float temperature = temperatures[row], top_p = top_ps[row], min_p = min_ps[row];
  const double top_k = top_ks[row];
  const float scale = scale_of(temperature);
  const uint64_t key = keys[row];
  const unsigned low = key, high = key >> 32;
  auto each = [&](auto take) {
    for_each(own, vocab, threadIdx.x * kEach, kThreads * kEach, take);
  };
  auto larger = [](unsigned long long a, unsigned long long b) { return max(a, b); };
  auto sum = [](float a, float b) { return a + b; };
  auto finish = [&](unsigned long long rank) {
    if (threadIdx.x == 0) {
      chosen[row] = token_of(rank);
      last_tokens[slots[row]] = token_of(rank);
    }
    let_next_kernel_begin();
  };

  unsigned long long top = 0;
  each([&](float logit, int token) { top = max(top, ranked(logit, token)); });
  top = join_block(top, ranks, larger);
  const float most = to_float(read_fresh(own + token_of(top)));
  if (temperature <= 0.f || !(most > -INFINITY)) return finish(top);

  // What min_p and top_k leave: the logits of which the ordered bits are at least these.
  unsigned least = min_p > 0.f ? ordered(most + __logf(min_p) / scale) : 0u;
  if (top_k > 0.0 && top_k < vocab) {
    unsigned kth = 0;
    for (int shift = 32 - kDigit; shift >= 32 - kBits<T>; shift -= kDigit) {
      int above[kDigits] = {};
      each([&](float logit, int) {
        const unsigned bits = ordered(logit);
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit)
          above[digit] += bits >= (kth | static_cast<unsigned>(digit + 1) << shift);
      });
      __syncthreads();
      if (threadIdx.x < kDigits) counts[threadIdx.x] = 0;
      __syncthreads();
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        const int all = sum_of_warp(above[digit]);
        if (threadIdx.x % kWarp == 0) atomicAdd(counts + digit, all);
      }
      __syncthreads();
      unsigned found = 0;
      for (int digit = 0; digit < kDigits; ++digit) found += counts[digit] >= top_k;
      kth |= found << shift;
    }
    least = max(least, kth);
  }

  float mass = 0.f;
  top = 0;
  auto enter = [&](float logit, int token) {
    const float score = logit * scale - log_of_time(token, low, high);
    top = max(top, ranked(score, token));
  };
  each([&](float logit, int token) {
    if (ordered(logit) < least) return;
    mass += __expf((logit - most) * scale);
    enter(logit, token);
  });
  top = join_block(top, ranks, larger);
  if (top_p >= 1.f) return finish(top);
  const float share = top_p * join_block(mass, masses, sum);
  while (true) {
    const unsigned long long winner = top;
    const float bound = to_float(read_fresh(own + token_of(winner)));
    mass = 0.f;
    top = 0;
    each([&](float logit, int token) {
      if (logit <= bound) return;
      mass += __expf((logit - most) * scale);
      enter(logit, token);
    });
    top = join_block(top, ranks, larger);
    if (top == 0 || join_block(mass, masses, sum) < share) return finish(winner);
  }
}

}  // namespace

void draw_filtered_tokens(TensorView logits, TensorView temperatures, TensorView top_ks,
                          TensorView top_ps, TensorView min_ps, TensorView keys, TensorView slots,
                          TensorView last_tokens, TensorView chosen) {
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(logits);
  const int rows = logits.size(0), vocab = logits.size(1);
  for_type_of(logits, [&](auto zero) {
    using T = decltype(zero);
    launch(draw_filtered<T>, dim3(rows), kThreads, get_stream(logits.device()), data<T>(logits),
           data<double>(temperatures), data<double>(top_ks), data<double>(top_ps),
           data<double>(min_ps), data<int64_t>(keys), data<int64_t>(slots),
           data<int64_t>(last_tokens), data<int64_t>(chosen), vocab, logits.stride(0));
  });
}

}  // namespace fi_runtime
