// Tensors as Python hands them over. The kernels read and write at addresses, so everything that an address stands
// for is checked here, where no caller can skip it: a plain tensor in this process's memory, its type, its shape, its
// order, and that its storage is as large as its shape says. No torch headers: a tensor is asked by its own
// attributes, which costs 0.4 us; nanobind's ndarray would cost 1.3 us, a third of a token's time for a layer's nine.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"

namespace million_experts {

namespace nb = nanobind;

// The first four are those of DType.
enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, i32 = 4, i64 = 5, u8 = 6, boolean = 7 };

// Sets of types, a bit each.
constexpr unsigned only(Type type) { return 1u << static_cast<int>(type); }
constexpr unsigned only(DType type) { return 1u << static_cast<int>(type); }
constexpr unsigned sums = only(Type::f32) | only(Type::f64);
constexpr unsigned floating = sums | only(Type::bf16) | only(Type::f16);

constexpr int64_t any = -1;  // a size that is not known beforehand

struct Tensor {
  static constexpr int most_dims = 4;

  const char* name = "";
  void* data = nullptr;
  Type type = Type::f32;
  int dims = 0;
  int64_t shape[most_dims] = {};

  DType dtype() const { return static_cast<DType>(type); }
  int64_t item_bytes() const;
  int64_t row_bytes() const;  // of all that stands at one place of the first dimension
  int64_t bytes() const { return dims ? shape[0] * row_bytes() : item_bytes(); }
  template <class T = void>
  T* at(int64_t row = 0) const {
    return data ? reinterpret_cast<T*>(static_cast<char*>(data) + row * row_bytes()) : nullptr;
  }
};

// The tensor, once it is sure that it has one of the types and the shape, lies in this process's memory without gaps,
// and that this memory is there (else BufferError). Raises TypeError or ValueError, which name it and say what came
// and what is allowed.
Tensor take(const char* name, nb::handle given, unsigned types, std::initializer_list<int64_t> shape);
Tensor take(const char* name, nb::handle given, unsigned types);  // of any shape

// The same, or a tensor without data for None.
Tensor take_optional(const char* name, nb::handle given, unsigned types, std::initializer_list<int64_t> shape);

// Raises ValueError unless the tensor has the shape.
void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape);

// Raises IndexError unless the int64 numbers of rows [first, first + count) lie in [0, limit).
void check_range(const Tensor& indices, int64_t first, int64_t count, int64_t limit);

// Raises ValueError unless low <= value <= high.
void check_number(const char* name, int64_t value, int64_t low, int64_t high);

}  // namespace million_experts
