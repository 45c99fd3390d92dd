// The Python module: which kernels run, buffers, and the entries.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "entries.h"
#include "memory.h"
#include "parallel.h"
#include "tensors.h"

namespace million_experts {
namespace {

using Address = uintptr_t;

std::atomic<const Kernels*> chosen{nullptr};

std::vector<std::string> instruction_sets() {
  size_t count;
  const Kernels* const* found = supported_kernels(&count);
  std::vector<std::string> names;
  for (size_t i = 0; i < count; ++i) names.emplace_back(found[i]->name);
  return names;
}

void use_instruction_set(const std::string& name) {
  size_t count;
  const Kernels* const* found = supported_kernels(&count);
  for (size_t i = 0; i < count; ++i)
    if (name == found[i]->name) {
      chosen = found[i];
      return;
    }
  throw std::invalid_argument("instruction set '" + name + "' is not one of those that run here");
}

struct Buffer {
  void* data;
  size_t bytes;
};

nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>, nb::c_contig> buffer(size_t bytes) {
  Buffer* taken = new Buffer{take_buffer(bytes), bytes};
  nb::capsule owner(taken, [](void* p) noexcept {
    Buffer* done = static_cast<Buffer*>(p);
    return_buffer(done->data, done->bytes);
    delete done;
  });
  return {taken->data, {bytes}, owner};
}

}  // namespace

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

}  // namespace million_experts

NB_MODULE(_kernels, m) {
  using namespace million_experts;
  m.doc() = "C++ kernels of million_experts.ops, called by ops/cpu.py.";
  use_instruction_set(instruction_sets().back());
  using namespace nb::literals;
  using unlocked = nb::call_guard<nb::gil_scoped_release>;

  m.def("instruction_sets", &instruction_sets, "Those that were compiled in and run here, slowest first.");
  m.def("instruction_set", [] { return std::string(kernels().name); }, "The one in use.");
  m.def("use_instruction_set", &use_instruction_set, nb::arg("name"));
  m.def(
      "use_openmp",
      [](Address parallel, Address thread_num, Address num_threads) {
        openmp = {reinterpret_cast<decltype(openmp.parallel)>(parallel),
                  reinterpret_cast<decltype(openmp.thread_num)>(thread_num),
                  reinterpret_cast<decltype(openmp.num_threads)>(num_threads)};
      },
      nb::arg("parallel"), nb::arg("thread_num"), nb::arg("num_threads"),
      "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads.");

  m.def("buffer", &buffer, nb::arg("bytes"), "A tensor of bytes on huge pages, not initialised, kept for reuse.");
  m.def("release_buffers", &release_buffers, unlocked());
  m.def("kept_bytes", &kept_bytes);
  m.def("advise_huge_pages", [](handle table) {
    const Tensor t = take("table", table, floating);
    return advise_huge_pages(t.data, static_cast<size_t>(t.bytes()));
  });
  m.def("collapse_to_huge_pages", [](handle table) {
    const Tensor t = take("table", table, floating);
    const nb::gil_scoped_release released;
    return collapse_to_huge_pages(t.data, static_cast<size_t>(t.bytes()));
  });

  m.def("expert_mlp_forward", &expert_mlp_forward);
  m.def("expert_mlp_backward", &expert_mlp_backward, "grad_y"_a, "indices"_a, "gates"_a, "experts"_a, "pre"_a,
        "grad_x"_a.none(), "grad_gates"_a.none(), "weights"_a.none(), "first"_a, "count"_a, "activation"_a,
        "block_experts"_a, "threads"_a);
  m.def("expert_mlp_table_grad", &expert_mlp_table_grad);
  m.def("expert_mlp_sort", &expert_mlp_sort);
  m.def("expert_mlp_touched_grad", &expert_mlp_touched_grad);
  m.def("expert_products_forward", &expert_products_forward);
  m.def("expert_products_backward", &expert_products_backward, "indices"_a, "gates"_a, "pre"_a, "products"_a,
        "of_up"_a, "of_inner"_a, "grad_gates"_a.none(), "first"_a, "activation"_a, "threads"_a);
  m.def("product_key_topk", &product_key_topk);
  m.def("product_key_topk_backward", &product_key_topk_backward);
  m.def("batch_norm", &batch_norm, "x"_a, "mask"_a.none(), "weight"_a, "bias"_a, "eps"_a, "y"_a, "mean"_a,
        "variance"_a, "threads"_a);
  m.def("batch_norm_backward", &batch_norm_backward, "grad_y"_a, "x"_a, "mask"_a.none(), "weight"_a, "mean"_a,
        "variance"_a, "eps"_a, "grad_x"_a, "grad_weight"_a, "grad_bias"_a, "threads"_a);
  m.def("layer_inference", &layer_inference);
  m.def("rowwise_adamw", &rowwise_adamw, "table"_a, "exp_avg"_a.none(), "exp_avg_sq"_a, "last_step"_a, "history"_a,
        "step"_a, "rows"_a.none(), "values"_a.none(), "places"_a.none(), "starts"_a.none(), "lr"_a, "beta1"_a,
        "beta2"_a, "eps"_a, "weight_decay"_a, "stochastic"_a, "key"_a, "threads"_a);
  m.def("random_read", &random_read);
}
