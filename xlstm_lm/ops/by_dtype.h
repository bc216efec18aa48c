// The types that the kernels compute in.

#pragma once

#include <ATen/core/Tensor.h>

namespace {

// body(T{}) with T as the tensor's: float or double.
template <typename F> auto by_dtype(const at::Tensor& like, F body) {
  if (like.scalar_type() == at::kDouble) return body(double{});
  TORCH_CHECK(like.scalar_type() == at::kFloat, "the CPU kernels compute in float32 or float64");
  return body(float{});
}

}  // namespace
