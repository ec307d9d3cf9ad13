// What comes between the projections of queries, keys and values and attention to them.
#include <type_traits>

#include "common.cuh"

namespace fi_runtime {
namespace {

// Row numbers of cache and tables, all int32.
struct Places {
  const int* rows;       // of each token; null: token i is of row i
  const int* positions;  // of each token
  const int* page_starts;
  const int* pages;
  int page_size;
};

template <typename Kept, typename T, int kCount>
__device__ __forceinline__ Vector<Kept, kCount> kept(const Vector<T, kCount>& from) {
  if constexpr (std::is_same_v<Kept, T>) {
    return from;
  } else {
    Vector<Kept, kCount> to;
#pragma unroll
    for (int i = 0; i < kCount; ++i) to.element[i] = from_float<Kept>(to_float(from.element[i]));
    return to;
  }
}

// A warp for each head of each token. A lane has as many elements of the first half of the head as
// of the second, those that turn with them. The cache is in T, or in a type of fewer bytes.
template <typename T, typename Kept, int kHeadDim>
__global__ void place(const T* qkv, T* q_out, const T* __restrict__ q_gain,
                      const T* __restrict__ k_gain, const float* __restrict__ cos_sin,
                      Kept* keys, Kept* values, Places places, int tokens, int heads, int kv_heads,
                      int64_t qkv_stride, int64_t q_stride, int64_t page_stride,
                      int64_t token_stride, float eps) {
  constexpr int kEach = kHeadDim / 2 / kWarp;
  using Some = Vector<T, kEach>;
  const int all = heads + 2 * kv_heads;
  const int number = (blockIdx.x * blockDim.x + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  wait_for_kernels_before(qkv, q_out, keys, values);
  if (number >= tokens * all) return;
  const int token = number / all, head = number % all;
  const int low = lane * kEach, high = low + kHeadDim / 2;
  const T* from = qkv + token * qkv_stride + head * kHeadDim;
  Some a = read_fresh(reinterpret_cast<const Some*>(from + low));
  Some b = read_fresh(reinterpret_cast<const Some*>(from + high));
  const int position = places.positions[token];
  if (head < heads + kv_heads) {
    const T* gain = head < heads ? q_gain : k_gain;
    if (gain != nullptr) {
      float squares = 0.f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float x = to_float(a.element[i]), y = to_float(b.element[i]);
        squares += x * x + y * y;
      }
      const float scale = rsqrtf(sum_of_warp(squares) / kHeadDim + eps);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        a.element[i] = from_float<T>(to_float(a.element[i]) * scale * to_float(gain[low + i]));
        b.element[i] = from_float<T>(to_float(b.element[i]) * scale * to_float(gain[high + i]));
      }
    }
    const float* angle = cos_sin + static_cast<int64_t>(position) * kHeadDim;
#pragma unroll
    for (int i = 0; cos_sin != nullptr && i < kEach; ++i) {
      const float cos = angle[low + i], sin = angle[high + i];
      const float x = to_float(a.element[i]), y = to_float(b.element[i]);
      a.element[i] = from_float<T>(x * cos - y * sin);
      b.element[i] = from_float<T>(y * cos + x * sin);
    }
  }
  if (head < heads) {
    T* to = q_out + token * q_stride + head * kHeadDim;
    *reinterpret_cast<Some*>(to + low) = a;
    *reinterpret_cast<Some*>(to + high) = b;
  } else {
    const int row = places.rows == nullptr ? token : places.rows[token];
    const int page = places.pages[places.page_starts[row] + position / places.page_size];
    const bool key = head < heads + kv_heads;
    Kept* to = (key ? keys : values) + page * page_stride +
               position % places.page_size * token_stride +
               (head - heads - (key ? 0 : kv_heads)) * kHeadDim;
    *reinterpret_cast<Vector<Kept, kEach>*>(to + low) = kept<Kept>(a);
    *reinterpret_cast<Vector<Kept, kEach>*>(to + high) = kept<Kept>(b);
  }
  let_next_kernel_begin();
}

constexpr int kThreads = 256;

}  // namespace

void place_qkv(TensorView qkv, TensorView q_out, Optional<TensorView> q_gain,
               Optional<TensorView> k_gain, Optional<TensorView> cos_sin, TensorView keys, TensorView values,
               Optional<TensorView> rows, TensorView positions, TensorView page_starts,
               TensorView pages, double eps) {
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(qkv);
  CHECK_DIM(3, q_out);
  CHECK_DIM(4, keys);
  const int tokens = qkv.size(0), heads = q_out.size(1), head_dim = q_out.size(2);
  const int page_size = keys.size(1), kv_heads = keys.size(2);
  TVM_FFI_ICHECK(qkv.size(1) == (heads + 2 * kv_heads) * head_dim) << "queries, keys and values";
  TVM_FFI_ICHECK(q_out.stride(1) == head_dim && keys.stride(2) == head_dim) << "heads must touch";
  TVM_FFI_ICHECK(!cos_sin.has_value() || cos_sin.value().size(1) == head_dim) << "whole heads turn";
  const Places places{data<int>(rows), data<int>(positions), data<int>(page_starts),
                      data<int>(pages), page_size};
  const int blocks = (tokens * (heads + 2 * kv_heads) * kWarp + kThreads - 1) / kThreads;
  const bool fp8 = encode_dlpack_dtype(keys.dtype()) == float8_e4m3fn_code;
  TVM_FFI_ICHECK(fp8 || keys.dtype() == qkv.dtype()) << "a cache of the same type, or of e4m3";
  DISPATCH_DLPACK_DTYPE_TO_CTYPE_FP16(qkv.dtype(), T, [&] {
    auto run = [&](auto kernel, auto* kept_keys, auto* kept_values) {
      launch(kernel, dim3(blocks), kThreads, get_stream(qkv.device()), data<T>(qkv), data<T>(q_out),
             data<T>(q_gain), data<T>(k_gain), data<float>(cos_sin), kept_keys, kept_values,
             places, tokens, heads, kv_heads, qkv.stride(0), q_out.stride(0), keys.stride(0),
             keys.stride(1), static_cast<float>(eps));
    };
    auto of_size = [&](auto* kept_keys, auto* kept_values) {
      using Kept = std::remove_pointer_t<decltype(kept_keys)>;
      if (head_dim == 64) {
        run(place<T, Kept, 64>, kept_keys, kept_values);
      } else if (head_dim == 128) {
        run(place<T, Kept, 128>, kept_keys, kept_values);
      } else {
        TVM_FFI_ICHECK(head_dim == 256) << "heads of 64, 128 or 256";
        run(place<T, Kept, 256>, kept_keys, kept_values);
      }
    };
    if (fp8) {
      of_size(data<__nv_fp8_e4m3>(keys), data<__nv_fp8_e4m3>(values));
    } else {
      of_size(data<T>(keys), data<T>(values));
    }
    return true;
  });
}

}  // namespace fi_runtime
