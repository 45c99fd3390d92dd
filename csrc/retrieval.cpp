// Product-key retrieval: the k best of n1 * n2 sums of sub-key scores, and the gradient of the winners' scores.
//
// Sub-key scores are computed for a few queries at a time and searched while they are in the first cache. Both
// halves' best come sorted, so the pair (a, b), counted from 0, has (a + 1) * (b + 1) pairs at least as good,
// itself among them, and need not be looked at where that is more than k: of 16 x 16 sums 50 remain.

#include "isa.h"
#include "pairs.h"
#include "parallel.h"
#include "scratch.h"
#include "sub_keys.h"
#include "topk.h"

namespace million_experts {
namespace {

// Rows of queries that share a codebook, a few at a time: (t, h) for all t and h, or for all t of one head. A block of
// tokens meets all heads before the next tokens come, as its heads' queries lie side by side: for one head after
// another, each query was on another page. One thread takes all heads of its tokens where there are blocks for all
// threads: their results share cache lines.
struct QueryRows {
  const Retrieval& a;
  int64_t per_codebook;

  explicit QueryRows(const Retrieval& a) : a(a), per_codebook(a.codebooks == 1 ? a.T * a.H : a.T) {}

  // t * H + h of the i-th query of a codebook
  int64_t row(int64_t codebook, int64_t i) const { return a.codebooks == 1 ? i : i * a.H + codebook; }

  // Calls body(part, codebook, thread) for all pairs of these, the parts of the queries in order.
  template <class Body>
  void for_parts(int64_t parts, const Body& body) const {
    const int64_t together = parts >= a.threads ? a.codebooks : 1, pairs = parts * a.codebooks;
    std::atomic<int64_t> next{0};
    parallel(a.threads, [&](int thread, int) {
      for (;;) {
        const int64_t item = next.fetch_add(1, std::memory_order_relaxed) * together;
        if (item >= pairs) return;
        for (int64_t i = item; i < item + together; ++i) body(i / a.codebooks, i % a.codebooks, thread);
      }
    });
  }
};

template <class A>
void topk(const RetrievalForward& a) {
  constexpr int P = panel_keys<A>;
  const A* query = static_cast<const A*>(a.query);
  A* scores = static_cast<A*>(a.scores);
  const int64_t n[2] = {a.n1, a.n2}, d = a.d, k = a.k;
  const int64_t panels[2] = {panels_of<A>(a.n1), panels_of<A>(a.n2)};
  const int64_t all_panels = panels[0] + panels[1];

  Scratch<A> packed(a.codebooks * all_panels * d * P);
  parallel_items(a.threads, a.codebooks * all_panels, [&](int64_t item) {
    const int64_t codebook = item / all_panels, panel = item % all_panels;
    const bool second = panel >= panels[0];
    const A* keys = static_cast<const A*>(second ? a.keys2 : a.keys1) + codebook * n[second] * d;
    pack_panel(keys, n[second], d, second ? panel - panels[0] : panel, packed.data + item * d * P);
  });

  const PairList pairs(k);
  const int64_t width = (panels[0] > panels[1] ? panels[0] : panels[1]) * P;
  const PairScratchSizes<A> sizes(width, k, pairs.count);
  const ThreadScratch<A> numbers(a.threads, sizes.numbers + query_rows * width);
  const ThreadScratch<int32_t> integers(a.threads, sizes.integers);
  const QueryRows rows(a);
  constexpr int64_t block = 8 * query_rows;
  rows.for_parts((rows.per_codebook + block - 1) / block, [&](int64_t part, int64_t codebook, int thread) {
    A* row_scores = numbers.of(thread);
    PairScratch<A> scratch(sizes, row_scores + query_rows * width, integers.of(thread));
    const int64_t from = part * block, to = from + block < rows.per_codebook ? from + block : rows.per_codebook;
    for (int64_t i = from; i < to; i += query_rows) {
      const int count = static_cast<int>(to - i < query_rows ? to - i : query_rows);
      for (int half = 0; half < 2; ++half) {
        const A* queries[query_rows] = {};
        for (int r = 0; r < count; ++r) queries[r] = query + rows.row(codebook, i + r) * 2 * d + half * d;
        const A* half_packed = packed.data + (codebook * all_panels + (half ? panels[0] : 0)) * d * P;
        for (int64_t panel = 0; panel < panels[half]; ++panel) {
          A* out[query_rows] = {};
          for (int r = 0; r < count; ++r) out[r] = row_scores + r * width + panel * P;
          score_rows(queries, count, d, half_packed + panel * d * P, out);
        }
        for (int r = 0; r < count; ++r) scratch.best_sub_keys(row_scores + r * width, n[half], k, half, r);
      }
      for (int r = 0; r < count; ++r) {
        const int64_t row = rows.row(codebook, i + r);
        scratch.best_pairs(pairs, k, a.n2, r, scores + row * k, a.indices + row * k);
      }
    }
  });
}

// --- backward ----------------------------------------------------------------------------------------------

constexpr int64_t partial_bytes = 32 << 20;
constexpr int64_t fetched_ahead = 8;  // queries; those of a head are too far apart for the processor to foresee

// The picks of one query half with equal sub-keys merged: a sub-key and the sum of its picks' gradients.
template <class A>
struct Picks {
  int32_t* seen;    // [n], where in the list a sub-key stands; -1 between calls
  int32_t* picked;  // [k], with repetitions
  int32_t* keys;    // [k]
  A* grads;         // [k], zeros between calls
  int64_t count = 0;

  // Without a branch: whether a sub-key was picked before cannot be predicted.
  void merge(const A* pick_grads, int64_t k) {
    int32_t *__restrict at = seen, *__restrict list = keys;
    const int32_t* __restrict key = picked;
    A* __restrict sums = grads;
    int32_t length = 0;
    for (int64_t c = 0; c < k; ++c) {
      const int32_t before = at[key[c]], place = before < 0 ? length : before;
      length += before < 0;
      at[key[c]] = place;
      list[place] = key[c];
      sums[place] += pick_grads[c];
    }
    count = length;
  }
  void clear() {
    for (int64_t i = 0; i < count; ++i) {
      seen[keys[i]] = -1;
      grads[i] = 0;
    }
    count = 0;
  }
};

// Sub-keys (i, j) of indices i * n2 + j. A product with the reciprocal is right but for one, and takes vectors, which
// division does not.
inline void split_indices(const int64_t* indices, int64_t k, int32_t n2, int32_t* first, int32_t* second) {
  const double reciprocal = 1.0 / n2;
  for (int64_t c = 0; c < k; ++c) {
    const int32_t i = static_cast<int32_t>(static_cast<double>(indices[c]) * reciprocal);
    const int32_t j = static_cast<int32_t>(indices[c] - int64_t{i} * n2);
    const int32_t wrong = (j >= n2) - (j < 0);
    first[c] = i + wrong;
    second[c] = j - wrong * n2;
  }
}

template <class A>
inline void add_scaled(A* y, const A* x, A weight, int64_t d) {
  int64_t at = 0;
  for (; at + lanes<A> <= d; at += lanes<A>) store(y + at, Vec<A>(load(y + at) + splat(weight) * load(x + at)));
  for (; at < d; ++at) y[at] += weight * x[at];
}

// Columns [at, ...) of one query half's gradients, as many blocks of `vectors` vectors as fit before d: the query's
// own, which is written, and its share of the sub-keys', which is added to `table`.
template <int vectors, class A>
inline int64_t spread_picks(const Picks<A>& picks, const A* query, const A* codes, A* grad_query, A* table,
                            int64_t at, int64_t d) {
  constexpr int W = lanes<A>;
  for (; at + vectors * W <= d; at += vectors * W) {
    Vec<A> sums[vectors] = {}, own[vectors];
    for (int v = 0; v < vectors; ++v) own[v] = load(query + at + v * W);
    for (int64_t c = 0; c < picks.count; ++c) {
      const Vec<A> grad = splat(picks.grads[c]);
      const int64_t row = picks.keys[c] * d + at;
      for (int v = 0; v < vectors; ++v) {
        sums[v] += grad * load(codes + row + v * W);
        store(table + row + v * W, Vec<A>(load(table + row + v * W) + grad * own[v]));
      }
    }
    for (int v = 0; v < vectors; ++v) store(grad_query + at + v * W, sums[v]);
  }
  return at;
}

template <class A>
inline void spread_picks(const Picks<A>& picks, const A* query, const A* codes, A* grad_query, A* table, int64_t d) {
  int64_t at = spread_picks<4>(picks, query, codes, grad_query, table, 0, d);
  at = spread_picks<2>(picks, query, codes, grad_query, table, at, d);
  at = spread_picks<1>(picks, query, codes, grad_query, table, at, d);
  for (int64_t i = at; i < d; ++i) {
    A sum = 0;
    for (int64_t c = 0; c < picks.count; ++c) {
      const int64_t row = picks.keys[c] * d + i;
      sum += picks.grads[c] * codes[row];
      table[row] += picks.grads[c] * query[i];
    }
    grad_query[i] = sum;
  }
}

template <class A>
void topk_backward(const RetrievalBackward& a) {
  const A* query = static_cast<const A*>(a.query);
  const A* keys[2] = {static_cast<const A*>(a.keys1), static_cast<const A*>(a.keys2)};
  const A* grad_scores = static_cast<const A*>(a.grad_scores);
  A* grad_query = static_cast<A*>(a.grad_query);
  A* grad_keys[2] = {static_cast<A*>(a.grad_keys1), static_cast<A*>(a.grad_keys2)};
  const int64_t n[2] = {a.n1, a.n2}, d = a.d, k = a.k, both = a.n1 + a.n2;
  const int32_t n2 = static_cast<int32_t>(a.n2);
  const QueryRows queries(a);
  const int64_t rows = queries.per_codebook;

  // Each part of the queries sums into tables of its own, which are then added up in order. How many parts
  // there are depends on the shape alone, so that the number of threads does not change a bit. A part of the tokens
  // meets all heads, as in forward.
  int64_t parts = rows / 256 < 16 ? rows / 256 : 16;
  const int64_t room = partial_bytes / (a.codebooks * both * d * static_cast<int64_t>(sizeof(A)) + 1);
  if (parts > room) parts = room;
  if (parts < 1) parts = 1;
  Scratch<A> tables(a.codebooks * parts * both * d);
  ThreadScratch<int32_t> integers(a.threads, both + 4 * k);
  ThreadScratch<A> numbers(a.threads, 2 * k);
  integers.fill(0xff);
  numbers.fill(0);
  queries.for_parts(parts, [&](int64_t part, int64_t codebook, int thread) {
    int32_t *own = integers.of(thread), *lists = own + both;
    A* own_numbers = numbers.of(thread);
    Picks<A> picks[2] = {{own, lists, lists + k, own_numbers},
                         {own + a.n1, lists + 2 * k, lists + 3 * k, own_numbers + k}};
    const int64_t place = codebook * parts + part;
    A* table[2] = {tables.data + place * both * d, tables.data + (place * both + a.n1) * d};
    std::memset(table[0], 0, sizeof(A) * static_cast<size_t>(both * d));
    for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
      const int64_t row = queries.row(codebook, i);
      if (i + fetched_ahead < rows) {
        const int64_t later = queries.row(codebook, i + fetched_ahead);
        prefetch_row(query + later * 2 * d, 2 * d * static_cast<int64_t>(sizeof(A)));
        prefetch_row(a.indices + later * k, k * static_cast<int64_t>(sizeof(int64_t)));
        prefetch_row(grad_scores + later * k, k * static_cast<int64_t>(sizeof(A)));
      }
      split_indices(a.indices + row * k, k, n2, picks[0].picked, picks[1].picked);
      for (int half = 0; half < 2; ++half) {
        const int64_t own_columns = (row * 2 + half) * d;
        picks[half].merge(grad_scores + row * k, k);
        spread_picks(picks[half], query + own_columns, keys[half] + codebook * n[half] * d,
                     grad_query + own_columns, table[half], d);
        picks[half].clear();
      }
    }
  });
  const int64_t slice = 4096;
  for (int half = 0; half < 2; ++half) {
    const int64_t size = n[half] * d, slices = (size + slice - 1) / slice;
    parallel_items(a.threads, a.codebooks * slices, [&](int64_t item) {
      const int64_t codebook = item / slices, from = item % slices * slice;
      const int64_t count = size - from < slice ? size - from : slice;
      A* out = grad_keys[half] + codebook * size + from;
      const A* in = tables.data + (codebook * parts * both + (half ? a.n1 : 0)) * d + from;
      std::memcpy(out, in, sizeof(A) * static_cast<size_t>(count));
      for (int64_t part = 1; part < parts; ++part) add_scaled(out, in + part * both * d, A(1), count);
    });
  }
}

}  // namespace

namespace ME_ISA {
void product_key_topk(const RetrievalForward& a) { a.dtype_sum == DType::f64 ? topk<double>(a) : topk<float>(a); }
void product_key_topk_backward(const RetrievalBackward& a) {
  a.dtype_sum == DType::f64 ? topk_backward<double>(a) : topk_backward<float>(a);
}
}  // namespace ME_ISA

}  // namespace million_experts
