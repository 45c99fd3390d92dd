// Large arrays on huge pages, kept after use: a fresh mapping of gigabytes costs more to touch for the first time
// than a kernel needs to fill it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace million_experts {

// At least `bytes`, on pages as large as the system grants; contents undefined. Throws std::bad_alloc.
void* take_buffer(size_t bytes);
// Gives a buffer back, to be taken again. If it is large, the system may have
// its memory meanwhile.
void return_buffer(void* data, size_t bytes);
// Frees what was returned; gives the number of bytes.
size_t release_buffers();
size_t kept_bytes();

// Asks for huge pages under an array whose pages were not touched yet. False where the system has none.
bool advise_huge_pages(void* data, size_t bytes);
// Moves an array that is in use onto huge pages, as far as the system can now. False where it cannot.
bool collapse_to_huge_pages(void* data, size_t bytes);

}  // namespace million_experts
