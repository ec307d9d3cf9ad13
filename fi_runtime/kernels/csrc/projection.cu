// Projections of a few rows, which take as long as their weights take to be read once.
//
// y = x W^T for up to 16 rows of x: tensor cores, with x as the 16 rows of the product's left side
// and 8 rows of W as its right. Each lane reads 16 bytes of a row of W at a time; which of the
// product's terms they are does not matter to the sum as long as x's are taken in the same order.
// The warps of a block divide the inner dimension among them and add up in shared memory.
//
// A norm of x is part of it: the weights of the norm are multiplied in as x is read, the squares of
// x are added up beside the products, and the result is scaled. So are what mostly follows: to add
// to the residual stream, or silu(gate) * up.
#include "common.cuh"

namespace fi_runtime {
namespace {

using T = nv_bfloat16;

constexpr int kRows = 16;   // of x
constexpr int kTile = 8;    // rows of W in one product
constexpr int kFewRows = 4096, kLongRows = 2048;  // of W, and of its inner dimension
constexpr int kInner = 32;  // of the inner dimension that a warp takes at a time: 8 of each lane

enum class After { kNothing, kAdd, kSiluAndMul };

__device__ __forceinline__ uint4 read_once(const T* at) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(at));
  return value;
}

__device__ __forceinline__ void multiply(float (&sums)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800  // bfloat16 products begin there, and so do the models that use them
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ float squares(unsigned pair) {
  float2 x = __bfloat1622float2(*reinterpret_cast<nv_bfloat162*>(&pair));
  return x.x * x.x + x.y * x.y;
}

__device__ __forceinline__ float squares(uint4 x) {
  return squares(x.x) + squares(x.y) + squares(x.z) + squares(x.w);
}

__device__ __forceinline__ unsigned times(unsigned a, unsigned b) {
  nv_bfloat162 product = __hmul2(*reinterpret_cast<nv_bfloat162*>(&a),
                                 *reinterpret_cast<nv_bfloat162*>(&b));
  return *reinterpret_cast<unsigned*>(&product);
}

__device__ __forceinline__ uint4 times(uint4 a, uint4 b) {
  return {times(a.x, b.x), times(a.y, b.y), times(a.z, b.z), times(a.w, b.w)};
}

// kTiles: of W in a block; with silu the second half are those of up. kMore: more than 8 rows of x.
// kAhead: reads of W that a lane has under way for each tile.
template <int kTiles, int kWarps, int kAhead, bool kMore, bool kNorm, After kAfter>
__global__ void __launch_bounds__(kWarps* kWarp)
    project(const T* x, const T* __restrict__ w, const T* __restrict__ gain,
            const T* __restrict__ bias, T* out, int rows, int outputs, int inner, int64_t x_stride,
            int64_t out_stride, float eps) {
  constexpr int kHalves = kAfter == After::kSiluAndMul ? 2 : 1;
  constexpr int kWidth = kTiles / kHalves * kTile;  // outputs of a block
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int row = lane / 4, part = lane % 4 * 8;
  const int first = blockIdx.x * kWidth;
  const int blocks = inner / kInner;

  const T* from[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    constexpr int kEach = kTiles / kHalves;
    const int of_half = first + tile % kEach * kTile + row;
    from[tile] = w + static_cast<int64_t>(tile / kEach * outputs + of_half) * inner + part;
  }
  uint4 weights[kAhead][kTiles];
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    const int block = warp + ahead * kWarps;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      weights[ahead][tile] = block < blocks ? read_once(from[tile] + block * kInner) : uint4{};
  }
  let_next_kernel_begin();
  wait_for_kernels_before(x, out);

  const T* here = x + row * x_stride + part;
  const T* below = here + 8 * x_stride;
  const bool has_here = row < rows, has_below = kMore && row + 8 < rows;
  uint4 x_here[kAhead], x_below[kAhead], gains[kAhead];
  auto read_x = [&](int ahead, int block) {
    const bool inside = block < blocks;
    x_here[ahead] = uint4{};
    if (inside && has_here) x_here[ahead] = read_fresh(reinterpret_cast<const uint4*>(here + block * kInner));
    if constexpr (kMore) {
      x_below[ahead] = uint4{};
      if (inside && has_below)
        x_below[ahead] = read_fresh(reinterpret_cast<const uint4*>(below + block * kInner));
    }
    if constexpr (kNorm) {
      gains[ahead] = uint4{};
      if (inside) gains[ahead] = *reinterpret_cast<const uint4*>(gain + part + block * kInner);
    }
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) read_x(ahead, warp + ahead * kWarps);

  float sums[kTiles][4] = {};
  float square_here = 0.f, square_below = 0.f;
  for (int begin = warp; begin < blocks; begin += kAhead * kWarps) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      uint4 a = x_here[ahead], b = kMore ? x_below[ahead] : uint4{};
      if constexpr (kNorm) {
        square_here += squares(a);
        a = times(a, gains[ahead]);
        if constexpr (kMore) {
          square_below += squares(b);
          b = times(b, gains[ahead]);
        }
      }
      const int next = begin + (ahead + kAhead) * kWarps;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 v = weights[ahead][tile];
        multiply(sums[tile], a.x, b.x, a.y, b.y, v.x, v.y);
        multiply(sums[tile], a.z, b.z, a.w, b.w, v.z, v.w);
        if (next < blocks) weights[ahead][tile] = read_once(from[tile] + next * kInner);
      }
      read_x(ahead, next);  // zeros beyond the end, whatever is left of the weights
    }
  }

  __shared__ float partial[kWarps][kTiles * kRows * kTile];
  __shared__ float partial_squares[kWarps][kRows];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float* at = partial[warp] + tile * kRows * kTile;
    const int column = lane % 4 * 2;
    *reinterpret_cast<float2*>(at + row * kTile + column) = {sums[tile][0], sums[tile][1]};
    *reinterpret_cast<float2*>(at + (row + 8) * kTile + column) = {sums[tile][2], sums[tile][3]};
  }
  if constexpr (kNorm) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      square_here += __shfl_xor_sync(0xffffffff, square_here, step);
      square_below += __shfl_xor_sync(0xffffffff, square_below, step);
    }
    if (lane % 4 == 0) {
      partial_squares[warp][row] = square_here;
      partial_squares[warp][row + 8] = square_below;
    }
  }
  __syncthreads();

  auto total = [&](int index) {
    float sum = 0.f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) sum += partial[other][index];
    return sum;
  };
  for (int index = threadIdx.x; index < rows * kWidth; index += kWarps * kWarp) {
    const int r = index / kWidth, column = index % kWidth;
    const int inside = column / kTile * kRows * kTile + r * kTile + column % kTile;
    float scale = 1.f;
    if constexpr (kNorm) {
      float sum = 0.f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) sum += partial_squares[other][r];
      scale = rsqrtf(sum / inner + eps);
    }
    float y = total(inside) * scale;
    if (bias != nullptr) y += __bfloat162float(bias[first + column]);
    T* to = out + r * out_stride + first + column;
    if constexpr (kAfter == After::kAdd) y += __bfloat162float(read_fresh(to));
    if constexpr (kAfter == After::kSiluAndMul) {
      float up = total(inside + kTiles / 2 * kRows * kTile) * scale;
      if (bias != nullptr) up += __bfloat162float(bias[outputs + first + column]);
      y = y / (1.f + __expf(-y)) * up;
    }
    *to = __float2bfloat16(y);
  }
}

template <int kTiles, int kWarps, bool kMore, bool kNorm, After kAfter>
void run(TensorView x, TensorView w, Optional<TensorView> gain, Optional<TensorView> bias,
         TensorView out, double eps) {
  const int outputs = out.size(1), inner = x.size(1);
  constexpr int kWidth = kTiles * kTile / (kAfter == After::kSiluAndMul ? 2 : 1);
  constexpr int kAhead = kTiles == 4 || kMore ? 2 : 4;
  launch(project<kTiles, kWarps, kAhead, kMore, kNorm, kAfter>, dim3(outputs / kWidth),
         kWarps * kWarp, get_stream(x.device()), data<T>(x), data<T>(w), data<T>(gain),
         data<T>(bias), data<T>(out), static_cast<int>(x.size(0)), outputs, inner, x.stride(0),
         out.stride(0), static_cast<float>(eps));
}

template <bool kNorm, After kAfter>
void choose(TensorView x, TensorView w, Optional<TensorView> gain, Optional<TensorView> bias,
            TensorView out, double eps) {
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(x);
  CHECK_LAST_DIM_CONTIGUOUS_INPUT(out);
  CHECK_INPUT(w);
  constexpr int kHalves = kAfter == After::kSiluAndMul ? 2 : 1;
  const int64_t outputs = out.size(1), inner = x.size(1);
  TVM_FFI_ICHECK(x.size(0) <= kRows && x.size(0) == out.size(0)) << "at most 16 rows";
  TVM_FFI_ICHECK(w.size(0) == kHalves * outputs && w.size(1) == inner) << "shape of the weights";
  TVM_FFI_ICHECK(inner % kInner == 0 && w.size(0) % (2 * kTile) == 0) << "sizes must be of 32, 16";
  auto dispatch = [&](auto tiles, auto warps) {
    if (x.size(0) > 8)
      run<tiles.value, warps.value, true, kNorm, kAfter>(x, w, gain, bias, out, eps);
    else
      run<tiles.value, warps.value, false, kNorm, kAfter>(x, w, gain, bias, out, eps);
  };
  using std::integral_constant;
  // As measured on an H100. Few long rows of W: many warps for each, and no more blocks than there
  // are processors. Otherwise blocks that several fit on a processor.
  const bool few_long = kHalves == 1 && w.size(0) <= kFewRows && inner >= kLongRows;
  if (few_long && w.size(0) > kFewRows / 2 && w.size(0) % (4 * kTile) == 0) {
    dispatch(integral_constant<int, 4>{}, integral_constant<int, 16>{});
  } else if (few_long) {
    dispatch(integral_constant<int, 2>{}, integral_constant<int, 16>{});
  } else {
    dispatch(integral_constant<int, 2>{}, integral_constant<int, 8>{});
  }
}

}  // namespace

// out = x W^T + bias, of the norm of x where there is a gain.
void linear(TensorView x, TensorView w, Optional<TensorView> gain, Optional<TensorView> bias,
            TensorView out, double eps) {
  if (gain.has_value())
    choose<true, After::kNothing>(x, w, gain, bias, out, eps);
  else
    choose<false, After::kNothing>(x, w, gain, bias, out, eps);
}

// out += x W^T + bias.
void linear_add(TensorView x, TensorView w, Optional<TensorView> bias, TensorView out) {
  choose<false, After::kAdd>(x, w, Optional<TensorView>(), bias, out, 0.0);
}

// out = silu(gate) * up of (gate, up) = norm(x) W^T + bias.
void linear_silu_and_mul(TensorView x, TensorView w, TensorView gain, Optional<TensorView> bias,
                         TensorView out, double eps) {
  choose<true, After::kSiluAndMul>(x, w, gain, bias, out, eps);
}

}  // namespace fi_runtime
