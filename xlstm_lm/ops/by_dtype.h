// The types that the kernels compute in.
//
// The inputs of an operator may have others: half precisions are computed in float32, and the conversions are inside,
// so that autograd keeps the inputs as they came.

#pragma once

#include <ATen/core/Tensor.h>

namespace {

// body(T{}) with T as the tensor's: float or double.
template <typename F> auto by_dtype(const at::Tensor& like, F body) {
  if (like.scalar_type() == at::kDouble) return body(double{});
  TORCH_CHECK(like.scalar_type() == at::kFloat, "the CPU kernels compute in float32 or float64");
  return body(float{});
}

// The type to compute in for inputs like `like`.
inline at::ScalarType compute_type(const at::Tensor& like) {
  return like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A tensor as the kernels read it: of type `type`, any strides, but its last dimension dense.
inline at::Tensor readable(const at::Tensor& x, at::ScalarType type) {
  const at::Tensor converted = x.to(type);
  return converted.stride(-1) == 1 ? converted : converted.contiguous();
}

}  // namespace
