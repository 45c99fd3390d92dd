#include "tensors.h"

#include <nanobind/stl/string.h>

namespace million_experts {
namespace {

constexpr int types = 8;
constexpr const char* type_names[types] = {"float32", "float64", "bfloat16", "float16", "int32", "int64", "uint8", "bool"};
constexpr int64_t type_bytes[types] = {4, 8, 2, 2, 4, 8, 1, 1};

// What is asked of every tensor. Never freed: the last kernel may run after this library's own objects are gone.
struct Torch {
  PyObject *tensor, *parameter, *no_dispatch, *dtypes[types];
  PyObject *dispatch, *dtype, *shape, *is_cpu, *is_contiguous, *is_neg, *data_ptr, *storage, *offset, *nbytes;

  Torch() {
    const nb::module_ torch = nb::module_::import_("torch");
    tensor = nb::object(torch.attr("Tensor")).release().ptr();
    parameter = nb::object(torch.attr("nn").attr("Parameter")).release().ptr();
    for (int i = 0; i < types; ++i) dtypes[i] = nb::object(torch.attr(type_names[i])).release().ptr();
    dispatch = PyUnicode_InternFromString("__torch_dispatch__");
    no_dispatch = nb::object(nb::handle(tensor).attr("__torch_dispatch__")).release().ptr();
    dtype = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_contiguous = PyUnicode_InternFromString("is_contiguous");
    is_neg = PyUnicode_InternFromString("is_neg");
    data_ptr = PyUnicode_InternFromString("data_ptr");
    storage = PyUnicode_InternFromString("untyped_storage");
    offset = PyUnicode_InternFromString("storage_offset");
    nbytes = PyUnicode_InternFromString("nbytes");
  }
};

const Torch& torch() {
  static const Torch* const found = new Torch;
  return *found;
}

nb::object get(nb::handle object, PyObject* attribute) {
  PyObject* const value = PyObject_GetAttr(object.ptr(), attribute);
  if (!value) nb::raise_python_error();
  return nb::steal(value);
}

nb::object call(nb::handle object, PyObject* method) {
  PyObject* const value = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (!value) nb::raise_python_error();
  return nb::steal(value);
}

int64_t integer(nb::handle value) {
  const int64_t number = PyLong_AsLongLong(value.ptr());
  if (number == -1 && PyErr_Occurred()) nb::raise_python_error();
  return number;
}

// Other classes of tensor may have no memory of their own, or compute what they hold when they are asked by PyTorch:
// all those that take part in its dispatch.
bool is_plain(nb::handle given) {
  const nb::handle type = given.type();
  if (type.ptr() == torch().tensor || type.ptr() == torch().parameter) return true;
  if (!PyObject_IsInstance(given.ptr(), torch().tensor)) return false;
  return get(type, torch().dispatch).is(torch().no_dispatch);
}

std::string class_name(nb::handle given) { return nb::cast<std::string>(given.type().attr("__name__")); }

std::string listed(const int64_t* sizes, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i)
    text += (i ? ", " : "") + (sizes[i] == any ? std::string("any") : std::to_string(sizes[i]));
  return text + "]";
}

std::string listed(unsigned allowed) {
  std::string text;
  for (int i = 0; i < types; ++i)
    if (allowed >> i & 1) text += (text.empty() ? "" : " or ") + std::string(type_names[i]);
  return text;
}

[[noreturn]] void refuse(const std::string& sentence) { throw nb::value_error(sentence.c_str()); }

Type type_of(const char* name, nb::handle given, unsigned allowed) {
  const nb::object dtype = get(given, torch().dtype);
  for (int i = 0; i < types; ++i)
    if (dtype.is(torch().dtypes[i]) && allowed >> i & 1) return static_cast<Type>(i);
  refuse(std::string(name) + " must be " + listed(allowed) + ", got " + nb::cast<std::string>(nb::str(dtype)));
}

}  // namespace

int64_t Tensor::item_bytes() const { return type_bytes[static_cast<int>(type)]; }

int64_t Tensor::row_bytes() const {
  int64_t bytes = item_bytes();
  for (int i = 1; i < dims; ++i) bytes *= shape[i];
  return bytes;
}

Tensor take(const char* name, nb::handle given, unsigned allowed) {
  if (!is_plain(given))
    throw nb::type_error((std::string(name) + " must be a plain torch.Tensor, got " + class_name(given)).c_str());
  if (get(given, torch().is_cpu).ptr() != Py_True) refuse(std::string(name) + " must be on the CPU");
  Tensor t;
  t.name = name;
  t.type = type_of(name, given, allowed);

  const nb::object shape = get(given, torch().shape);
  if (!PyTuple_Check(shape.ptr())) refuse(std::string(name) + " must have a shape that is a tuple");
  const size_t dims = static_cast<size_t>(PyTuple_GET_SIZE(shape.ptr()));
  if (dims > Tensor::most_dims) refuse(std::string(name) + " must have at most 4 dimensions, got " + std::to_string(dims));
  t.dims = static_cast<int>(dims);
  int64_t count = 1;
  for (size_t i = 0; i < dims; ++i) count *= t.shape[i] = integer(PyTuple_GET_ITEM(shape.ptr(), i));

  if (call(given, torch().is_contiguous).ptr() != Py_True) refuse(std::string(name) + " must be contiguous");
  if (call(given, torch().is_neg).ptr() == Py_True) refuse(std::string(name) + " must not be a view that negates");
  t.data = reinterpret_cast<void*>(integer(call(given, torch().data_ptr)));
  // Storage can shrink under a tensor: FSDP empties a parameter so between its uses.
  const int64_t stored = integer(call(call(given, torch().storage), torch().nbytes));
  const int64_t needed = (integer(call(given, torch().offset)) + count) * t.item_bytes();
  if (count > 0 && (!t.data || stored < needed))
    throw nb::buffer_error((std::string(name) + " must lie in memory whole: it needs " + std::to_string(needed) +
                            " bytes, its storage has " + std::to_string(stored))
                               .c_str());
  return t;
}

Tensor take(const char* name, nb::handle given, unsigned allowed, std::initializer_list<int64_t> sizes) {
  const Tensor t = take(name, given, allowed);
  check_shape(t, sizes);
  return t;
}

void check_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool fits = static_cast<size_t>(t.dims) == sizes.size();
  for (int i = 0; fits && i < t.dims; ++i) fits = sizes.begin()[i] == any || sizes.begin()[i] == t.shape[i];
  if (!fits)
    refuse(std::string(t.name) + " must have shape " + listed(sizes.begin(), sizes.size()) + ", got " +
           listed(t.shape, static_cast<size_t>(t.dims)));
}

Tensor take_optional(const char* name, nb::handle given, unsigned allowed, std::initializer_list<int64_t> sizes) {
  if (!given.is_none()) return take(name, given, allowed, sizes);
  Tensor none;
  none.name = name;
  return none;
}

void check_range(const Tensor& indices, int64_t first, int64_t count, int64_t limit) {
  const int64_t* const begin = indices.at<int64_t>(first);
  const int64_t* const end = indices.at<int64_t>(first + count);
  int64_t low = 0, high = -1;
  for (const int64_t* at = begin; at != end; ++at) {
    low = *at < low ? *at : low;
    high = *at > high ? *at : high;
  }
  if (low < 0 || high >= limit)
    throw nb::index_error((std::string(indices.name) + " must lie in [0, " + std::to_string(limit) +
                           "), got values from " + std::to_string(low) + " to " + std::to_string(high))
                              .c_str());
}

void check_number(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high)
    refuse(std::string(name) + " must lie in [" + std::to_string(low) + ", " + std::to_string(high) + "], got " +
           std::to_string(value));
}

}  // namespace million_experts
