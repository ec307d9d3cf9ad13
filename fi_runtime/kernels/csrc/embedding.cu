// Rows of the embedding, of tokens that only the device may know.
#include "common.cuh"

namespace fi_runtime {
namespace {

constexpr int kThreads = 256;

// A block for each token: its row of the table. -1 - slot stands for the last token of a slot.
__global__ void embed(const int64_t* tokens, const int64_t* last_tokens,
                      const uint4* __restrict__ table, uint4* out, int row_size) {
  wait_for_kernels_before(tokens, last_tokens, out);
  int64_t token = read_fresh(tokens + blockIdx.x);
  if (token < 0) token = read_fresh(last_tokens + (-1 - token));
  for (int i = threadIdx.x; i < row_size; i += blockDim.x)
    out[static_cast<int64_t>(blockIdx.x) * row_size + i] = table[token * row_size + i];
  let_next_kernel_begin();
}

}  // namespace

void embed_tokens(TensorView tokens, TensorView last_tokens, TensorView table, TensorView out) {
  CHECK_INPUT(table);
  CHECK_INPUT(out);
  const int row_bytes = table.size(1) * get_element_size(table);
  TVM_FFI_ICHECK(row_bytes % sizeof(uint4) == 0) << "rows must be of a multiple of 16 bytes";
  launch(embed, dim3(tokens.size(0)), kThreads, get_stream(table.device()), data<int64_t>(tokens),
         data<int64_t>(last_tokens), data<uint4>(table), data<uint4>(out),
         static_cast<int>(row_bytes / sizeof(uint4)));
}

}  // namespace fi_runtime
