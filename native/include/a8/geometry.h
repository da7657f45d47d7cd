// Sizes that fix how work is cut and therefore the order of every sum. All backends share them, so they are part of
// the numerics: changing one changes the bits of Adafactor. Plain integers, read by Python too (loader/sources.py).
#pragma once

// Elements of one chunk of the flattened tensor: the unit of work of every element-wise pass and of the norms.
#define A8_CHUNK 16384

// Accumulators of a sum: element e goes to accumulator e % A8_LANES, then the accumulators are folded in halves.
#define A8_LANES 256

// A chunk's squares, where the second moment is element-wise, are dealt to so many sums: those of line l, of A8_LANES
// elements, to sum l % A8_DEALT. The sums are then folded in halves.
#define A8_DEALT 8

// One tile of a matrix in the row/column reduction: A8_TILE_ROWS x A8_TILE_COLS. A column is summed over runs of
// A8_RUN_ROWS rows (what one warp holds in registers), then over the runs of the tile in order.
#define A8_TILE_ROWS 512
#define A8_TILE_COLS 1024
#define A8_RUN_ROWS 64

// Elements at the beginning of a chunk that its fingerprint looks at: neighbours, for a sample spread over many pages
// costs a page walk each (half of the norm phase, measured). Not part of the numerics.
#define A8_SAMPLES 8

// Totals of a tensor in the scratch: of p^2, of u^2, and the factor of the norm-growth limiter.
#define A8_TOTALS 4

// Block sizes of a quantised state: powers of two in this range.
#define A8_MIN_BLOCK 32
#define A8_MAX_BLOCK 4096

// The one that optimizers choose by default, for which there are faster kernels. Not part of the numerics.
#define A8_USUAL_BLOCK 128

// Threads of a block of every CUDA kernel. Not part of the numerics.
#define A8_THREADS 256

// The most that a8_upload copies: together with an address and a count it fits into a kernel's 4 KB of arguments. Not
// part of the numerics.
#define A8_UPLOAD_BYTES 1024

// So many chunks of Adafactor's are few: each then has a block of threads of its own, for a GPU takes some hundreds of
// blocks at a time. Not part of the numerics.
#ifndef A8_FEW_CHUNKS
#define A8_FEW_CHUNKS 2048
#endif
