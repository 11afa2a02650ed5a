/* Attention in C: a sliding window over one sequence, and what an error looks like. Checks itself
 * against a plain loop.
 *
 * Built against an installed anymask:
 *   cc -O2 attention.c -lanymask -lm -o attention && ./attention
 */
#include <anymask/anymask.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { kLength = 256, kHeads = 2, kHeadDim = 32, kLeft = 48 };

static float q[kLength][kHeads][kHeadDim], k[kLength][kHeads][kHeadDim];
static float v[kLength][kHeads][kHeadDim], out[kLength][kHeads][kHeadDim];
static float lse[kHeads][kLength];

/* A contiguous float32 view of the caller's memory, [1, a, b, c]; c == 0: [1, a, b]. */
static anymask_tensor view(void* data, int64_t a, int64_t b, int64_t c) {
  anymask_tensor tensor;
  memset(&tensor, 0, sizeof(tensor));
  tensor.data = data;
  tensor.dtype = ANYMASK_F32;
  tensor.device_type = ANYMASK_CPU;
  tensor.ndim = c == 0 ? 3 : 4;
  tensor.shape[0] = 1;
  tensor.shape[1] = a;
  tensor.shape[2] = b;
  tensor.shape[3] = c;
  int64_t step = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    tensor.stride[i] = step;
    step *= tensor.shape[i];
  }
  return tensor;
}

static void fill(float* values, int count, unsigned seed) {
  for (int i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    values[i] = (float)(seed >> 8) / (float)(1u << 23) - 1.0f; /* in [-1, 1) */
  }
}

static double largest_difference(void) {
  double largest = 0;
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kLength; ++i) {
      double weights = 0, sums[kHeadDim] = {0};
      for (int j = i < kLeft ? 0 : i - kLeft; j <= i; ++j) {
        double score = 0;
        for (int d = 0; d < kHeadDim; ++d) score += (double)q[i][h][d] * k[j][h][d];
        const double weight = exp(score / sqrt((double)kHeadDim));
        weights += weight;
        for (int d = 0; d < kHeadDim; ++d) sums[d] += weight * v[j][h][d];
      }
      for (int d = 0; d < kHeadDim; ++d) {
        largest = fmax(largest, fabs(out[i][h][d] - sums[d] / weights));
      }
      largest = fmax(largest, fabs(lse[h][i] - log(weights)));
    }
  }
  return largest;
}

int main(void) {
  fill(&q[0][0][0], kLength * kHeads * kHeadDim, 1);
  fill(&k[0][0][0], kLength * kHeads * kHeadDim, 2);
  fill(&v[0][0][0], kLength * kHeads * kHeadDim, 3);

  /* A mask is an array of nodes in postfix order; this one has a single leaf. */
  anymask_node window;
  memset(&window, 0, sizeof(window));
  window.kind = ANYMASK_SLIDING_WINDOW;
  window.left = kLeft;
  window.right = 0;

  anymask_forward_args args;
  memset(&args, 0, sizeof(args));
  args.q = view(q, kLength, kHeads, kHeadDim);
  args.k = view(k, kLength, kHeads, kHeadDim);
  args.v = view(v, kLength, kHeads, kHeadDim);
  args.out = view(out, kLength, kHeads, kHeadDim);
  args.lse = view(lse, kHeads, kLength, 0);
  args.mask.nodes = &window;
  args.mask.count = 1;
  args.scale = NAN; /* 1 / sqrt(head_dim) */

  if (anymask_attention_forward(&args) != ANYMASK_OK) {
    fprintf(stderr, "anymask: %s\n", anymask_last_error());
    return 1;
  }
  const double difference = largest_difference();
  printf("anymask %s: sliding window of %d keys over %d, largest difference to a plain loop %.1e\n",
         anymask_version(), kLeft + 1, kLength, difference);

  /* Nothing aborts: a wrong call says what it got and what it needs, and the next one works. */
  args.k.dtype = ANYMASK_F64;
  const anymask_status status = anymask_attention_forward(&args);
  printf("a wrong call: status %d, \"%s\"\n", (int)status, anymask_last_error());
  args.k.dtype = ANYMASK_F32;
  const int works_again = anymask_attention_forward(&args) == ANYMASK_OK;
  return difference < 1e-5 && status != ANYMASK_OK && works_again ? 0 : 1;
}
