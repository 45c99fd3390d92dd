// The Python side: addresses, sizes and a number of threads in, nothing out. `ops/cpu.py` owns the tensors and
// checks them; nothing here is meant for other callers. The interpreter lock is released while a kernel runs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <stdexcept>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"

namespace nb = nanobind;
using namespace million_experts;
using Address = uintptr_t;

namespace {

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() { return *chosen.load(std::memory_order_relaxed); }

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

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

ExpertMlp expert_mlp(int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R,
                     int64_t D, Address indices, Address gates, Address experts, int64_t pre_stride,
                     int64_t block_experts, int threads) {
  return {DType(dtype_sum), DType(dtype_experts), Activation(activation), T, K, N, R, D, at<int64_t>(indices),
          at(gates), at(experts), pre_stride, block_experts, threads};
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

NB_MODULE(_kernels, m) {
  m.doc() = "C++ kernels of million_experts.ops, called by ops/cpu.py.";
  use_instruction_set(instruction_sets().back());
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
  m.def(
      "advise_huge_pages", [](Address data, size_t bytes) { return advise_huge_pages(at(data), bytes); }, unlocked());
  m.def(
      "collapse_to_huge_pages", [](Address data, size_t bytes) { return collapse_to_huge_pages(at(data), bytes); },
      unlocked());

  m.def(
      "expert_mlp_forward",
      [](int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R, int64_t D,
         Address indices, Address gates, Address experts, int64_t pre_stride, int64_t block_experts, int threads,
         Address x, Address y,
         Address pre) {
        ExpertMlpForward a;
        static_cast<ExpertMlp&>(a) = expert_mlp(dtype_sum, dtype_experts, activation, T, K, N, R, D, indices, gates,
                                                experts, pre_stride, block_experts, threads);
        a.x = at(x), a.y = at(y), a.pre = at(pre);
        kernels().expert_mlp_forward(a);
      },
      unlocked());
  m.def(
      "expert_mlp_backward",
      [](int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R, int64_t D,
         Address indices, Address gates, Address experts, int64_t pre_stride, int64_t block_experts, int threads,
         Address grad_y,
         Address pre, Address grad_x, Address grad_gates, Address weights) {
        ExpertMlpBackward a;
        static_cast<ExpertMlp&>(a) = expert_mlp(dtype_sum, dtype_experts, activation, T, K, N, R, D, indices, gates,
                                                experts, pre_stride, block_experts, threads);
        a.grad_y = at(grad_y), a.pre = at(pre), a.grad_x = at(grad_x), a.grad_gates = at(grad_gates);
        a.weights = at(weights);
        kernels().expert_mlp_backward(a);
      },
      unlocked());
  m.def(
      "expert_mlp_table_grad",
      [](int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R, int64_t D,
         Address indices, Address gates, Address experts, int64_t pre_stride, int64_t block_experts, int threads,
         Address x,
         Address grad_y, Address weights, Address grad_experts, bool accumulate) {
        ExpertMlpTableGrad a;
        static_cast<ExpertMlp&>(a) = expert_mlp(dtype_sum, dtype_experts, activation, T, K, N, R, D, indices, gates,
                                                experts, pre_stride, block_experts, threads);
        a.x = at(x), a.grad_y = at(grad_y), a.weights = at(weights), a.grad_experts = at(grad_experts), a.accumulate = accumulate;
        kernels().expert_mlp_table_grad(a);
      },
      unlocked());
  m.def(
      "expert_mlp_sort",
      [](int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R, int64_t D,
         Address indices, Address gates, Address experts, int64_t pre_stride, int64_t block_experts, int threads,
         Address weights, Address sorted, Address starts) {
        ExpertMlpSort a;
        static_cast<ExpertMlp&>(a) = expert_mlp(dtype_sum, dtype_experts, activation, T, K, N, R, D, indices, gates,
                                                experts, pre_stride, block_experts, threads);
        a.weights = at(weights), a.sorted = at(sorted), a.starts = at<int64_t>(starts);
        kernels().expert_mlp_sort(a);
        return a.touched;
      },
      unlocked());
  m.def(
      "expert_mlp_touched_grad",
      [](int dtype_sum, int dtype_experts, int activation, int64_t T, int64_t K, int64_t N, int64_t R, int64_t D,
         Address indices, Address gates, Address experts, int64_t pre_stride, int64_t block_experts, int threads,
         Address x, Address grad_y, Address sorted, Address starts, int64_t touched, Address rows, Address values) {
        ExpertMlpTouchedGrad a;
        static_cast<ExpertMlp&>(a) = expert_mlp(dtype_sum, dtype_experts, activation, T, K, N, R, D, indices, gates,
                                                experts, pre_stride, block_experts, threads);
        a.x = at(x), a.grad_y = at(grad_y), a.sorted = at(sorted), a.starts = at<int64_t>(starts);
        a.touched = touched, a.rows = at<int64_t>(rows), a.values = at(values);
        kernels().expert_mlp_touched_grad(a);
      },
      unlocked());
  const auto products = [](auto run) {
    return [run](int activation, int64_t T, int64_t K, int64_t N, int64_t R, Address indices, Address gates,
                 int64_t pre_stride, Address pre, Address products, Address of_up, Address of_inner, Address grad_gates,
                 int threads) {
      (kernels().*run)({Activation(activation), T, K, N, R, at<int64_t>(indices), at<float>(gates), pre_stride,
                        at<float>(pre), at(products), at(of_up), at(of_inner), at<float>(grad_gates), threads});
    };
  };
  m.def("expert_products_forward", products(&Kernels::expert_products_forward), unlocked());
  m.def("expert_products_backward", products(&Kernels::expert_products_backward), unlocked());
  m.def(
      "product_key_topk",
      [](int dtype_sum, int64_t T, int64_t H, int64_t d, int64_t n1, int64_t n2, int64_t k, int64_t codebooks,
         Address query, Address keys1, Address keys2, int threads, Address scores, Address indices) {
        RetrievalForward a;
        static_cast<Retrieval&>(a) = {DType(dtype_sum), T, H, d, n1, n2, k, codebooks, at(query), at(keys1),
                                      at(keys2), threads};
        a.scores = at(scores), a.indices = at<int64_t>(indices);
        kernels().product_key_topk(a);
      },
      unlocked());
  m.def(
      "product_key_topk_backward",
      [](int dtype_sum, int64_t T, int64_t H, int64_t d, int64_t n1, int64_t n2, int64_t k, int64_t codebooks,
         Address query, Address keys1, Address keys2, int threads, Address grad_scores, Address indices,
         Address grad_query, Address grad_keys1, Address grad_keys2) {
        RetrievalBackward a;
        static_cast<Retrieval&>(a) = {DType(dtype_sum), T, H, d, n1, n2, k, codebooks, at(query), at(keys1),
                                      at(keys2), threads};
        a.grad_scores = at(grad_scores), a.indices = at<int64_t>(indices), a.grad_query = at(grad_query);
        a.grad_keys1 = at(grad_keys1), a.grad_keys2 = at(grad_keys2);
        kernels().product_key_topk_backward(a);
      },
      unlocked());
  m.def(
      "batch_norm",
      [](int dtype_sum, int64_t T, int64_t C, Address x, Address mask, Address weight, Address bias, double eps,
         int threads, Address y, Address mean, Address variance) {
        BatchNorm a{};
        a.dtype_sum = DType(dtype_sum), a.T = T, a.C = C, a.x = at(x), a.mask = at<uint8_t>(mask);
        a.weight = at(weight), a.bias = at(bias), a.eps = eps, a.threads = threads;
        a.y = at(y), a.mean = at(mean), a.variance = at(variance);
        kernels().batch_norm(a);
      },
      unlocked());
  m.def(
      "batch_norm_backward",
      [](int dtype_sum, int64_t T, int64_t C, Address grad_y, Address x, Address mask, Address weight, Address mean,
         Address variance, double eps, int threads, Address grad_x, Address grad_weight, Address grad_bias) {
        BatchNorm a{};
        a.dtype_sum = DType(dtype_sum), a.T = T, a.C = C, a.x = at(x), a.mask = at<uint8_t>(mask);
        a.weight = at(weight), a.mean = at(mean), a.variance = at(variance), a.eps = eps, a.threads = threads;
        a.grad_y = at(grad_y), a.grad_x = at(grad_x), a.grad_weight = at(grad_weight), a.grad_bias = at(grad_bias);
        kernels().batch_norm_backward(a);
      },
      unlocked());
  m.def(
      "layer_inference",
      [](int64_t T, int64_t D, int64_t H, int64_t k, int64_t d, int64_t n1, int64_t n2, int64_t codebooks, int64_t R,
         Address x, Address query_weight, int query_norm, Address norm_weight, Address norm_bias, Address norm_mean,
         Address norm_var, double eps, Address keys1, Address keys2, int score, int activation, int dtype_experts,
         Address experts, Address y, int threads) {
        const LayerInference a{T, D, H, k, d, n1, n2, codebooks, R, n1 * n2, at<float>(x), at<float>(query_weight),
                               QueryNorm(query_norm), at<float>(norm_weight), at<float>(norm_bias),
                               at<float>(norm_mean), at<float>(norm_var), eps, at<float>(keys1), at<float>(keys2),
                               Score(score), Activation(activation), DType(dtype_experts), at(experts), at<float>(y),
                               threads};
        kernels().layer_inference(a);
      },
      unlocked());
  m.def(
      "rowwise_adamw",
      [](int dtype_sum, int dtype_table, int dtype_momentum, int dtype_values, int64_t N, int64_t R, int64_t D,
         int64_t n, Address table, Address exp_avg, Address exp_avg_sq, Address last_step, Address history,
         int64_t step, Address rows, Address values, Address places, Address starts, double lr, double beta1,
         double beta2, double eps, double weight_decay, bool by_row, bool stochastic, uint64_t key, int threads) {
        const RowwiseAdamW a{DType(dtype_sum), DType(dtype_table), DType(dtype_momentum), DType(dtype_values), N, R, D,
                             n, at(table), at(exp_avg), at(exp_avg_sq), at<int32_t>(last_step), at<double>(history),
                             step, at<int64_t>(rows), at(values), at<int64_t>(places), at<int64_t>(starts), lr, beta1,
                             beta2, eps, weight_decay, by_row, stochastic, key, threads};
        kernels().rowwise_adamw(a);
      },
      unlocked());
  m.def(
      "random_read",
      [](Address table, int64_t row_bytes, Address rows, int64_t count, int threads) {
        RandomRead a{at(table), row_bytes, at<int64_t>(rows), count, 0, threads};
        kernels().random_read(a);
        return a.checksum;
      },
      unlocked());
}
