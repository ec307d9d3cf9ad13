// What Python calls.
#include "common.cuh"

namespace fi_runtime {

void linear(TensorView x, TensorView w, Optional<TensorView> gain, Optional<TensorView> bias,
            TensorView out, double eps);
void linear_add(TensorView x, TensorView w, Optional<TensorView> bias, TensorView out);
void linear_silu_and_mul(TensorView x, TensorView w, TensorView gain, Optional<TensorView> bias,
                         TensorView out, double eps);
void place_qkv(TensorView qkv, TensorView q_out, Optional<TensorView> q_gain,
               Optional<TensorView> k_gain, Optional<TensorView> cos_sin, TensorView keys, TensorView values,
               Optional<TensorView> rows, TensorView positions, TensorView page_starts,
               TensorView pages, double eps);
void round_rows(TensorView x, TensorView codes, TensorView scales);
void merge_parts(TensorView parts, TensorView sums, TensorView starts, TensorView out,
                 Optional<TensorView> out_sums);
void embed_tokens(TensorView tokens, TensorView last_tokens, TensorView table, TensorView out);
void race_tokens(TensorView logits, TensorView temperatures, TensorView keys, TensorView slots,
                 TensorView last_tokens, TensorView chosen, TensorView scratch);
void draw_filtered_tokens(TensorView logits, TensorView temperatures, TensorView top_ks,
                          TensorView top_ps, TensorView min_ps, TensorView keys, TensorView slots,
                          TensorView last_tokens, TensorView chosen);

TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear, linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_add, linear_add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_silu_and_mul, linear_silu_and_mul);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(place_qkv, place_qkv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(round_rows, round_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_parts, merge_parts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_tokens, embed_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(race_tokens, race_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draw_filtered_tokens, draw_filtered_tokens);

}  // namespace fi_runtime
