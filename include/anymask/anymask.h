/* anymask's C ABI: the one door that every other language uses.
 *
 * Stateless: a mask is an array of nodes, a plan is a buffer of the caller's, so nothing is
 * created or freed across the border. Every function returns an anymask_status; after anything but
 * ANYMASK_OK, anymask_last_error() (per thread) says what went wrong. Meanings, shapes and types of
 * all arguments are those of the C++ functions of the same name (the headers beside this one).
 */
#ifndef ANYMASK_ANYMASK_H_
#define ANYMASK_ANYMASK_H_

#include <stdint.h>

#if defined(_WIN32)
#define ANYMASK_API __declspec(dllexport)
#else
#define ANYMASK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t anymask_status;
enum {
  ANYMASK_OK = 0,
  ANYMASK_INVALID_VALUE = 1,   /* ValueError in Python */
  ANYMASK_INVALID_TYPE = 2,    /* TypeError */
  ANYMASK_UNSUPPORTED = 3,     /* NotImplementedError */
  ANYMASK_RUNTIME_FAILURE = 4, /* RuntimeError */
};

enum { /* dtype */
       ANYMASK_F32 = 0,
       ANYMASK_F16 = 1,
       ANYMASK_BF16 = 2,
       ANYMASK_F64 = 3,
       ANYMASK_I32 = 4,
       ANYMASK_I64 = 5,
       ANYMASK_U8 = 6, /* also bool */
       ANYMASK_I8 = 7,
       ANYMASK_I16 = 8,
};

enum { /* device_type */
       ANYMASK_CPU = 0,
       ANYMASK_CUDA = 1,
};

enum { /* kind of a mask node; how each uses left, right and arrays */
       ANYMASK_FULL = 0,
       ANYMASK_CAUSAL = 1,
       ANYMASK_SLIDING_WINDOW = 2, /* left, right; negative: open */
       ANYMASK_PREFIX_LM = 3,      /* left = length, or arrays[0] = lengths */
       ANYMASK_DOCUMENTS = 4,      /* arrays: q_ids, kv_ids */
       ANYMASK_CU_DOCUMENTS = 5,   /* arrays[0] = cu_seqlens */
       ANYMASK_INTERVALS = 6,      /* arrays[0] = startend_row_indices, left = causal */
       ANYMASK_BLOCKS = 7,         /* arrays[0] = block_mask, left = rows, right = columns */
       ANYMASK_DENSE = 8,          /* arrays[0] = allowed */
       ANYMASK_IDS = 9,            /* arrays: eq, ek */
       ANYMASK_NOT = 100,
       ANYMASK_AND = 101,
       ANYMASK_OR = 102,
       ANYMASK_REORDERED = 103, /* the operand, with the hint that its keys are scattered */
};

/* A view: strides in elements. ndim == 0 stands for "none". */
typedef struct {
  void* data;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
  int32_t ndim;
  int64_t shape[4];
  int64_t stride[4];
} anymask_tensor;

typedef struct {
  int32_t kind;
  int32_t reserved; /* 0 */
  int64_t left;
  int64_t right;
  anymask_tensor arrays[2];
} anymask_node;

/* Nodes in postfix order. */
typedef struct {
  const anymask_node* nodes;
  int64_t count;
} anymask_mask;

typedef struct {
  int64_t batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
  int32_t reserved;
} anymask_problem;

/* anymask::ScoreOptions */
typedef struct {
  anymask_tensor key_bias, bias, sink, seed_offset;
  double softcap;
  double dropout_p;
} anymask_score_options;

/* Outputs of the backward pass; "none": not wanted. */
typedef struct {
  anymask_tensor dkey_bias, dbias, dsink;
} anymask_score_gradients;

typedef struct {
  anymask_tensor q, k, v, out, lse;
  anymask_mask mask;
  const anymask_score_options* scores; /* NULL: none */
  const void* plan;                    /* NULL on the CPU: the call makes one */
  int64_t plan_bytes;
  double scale; /* NaN: 1 / sqrt(head_dim) */
  void* stream;
  void* workspace;
  int64_t workspace_bytes;
} anymask_forward_args;

typedef struct {
  anymask_tensor q, k, v, out, lse, dout, dlse, dq, dk, dv; /* dlse may be none */
  anymask_mask mask;
  const anymask_score_options* scores;
  const anymask_score_gradients* score_gradients; /* NULL: none are wanted */
  const void* plan;
  int64_t plan_bytes;
  double scale;
  void* stream;
  void* workspace;
  int64_t workspace_bytes;
  int32_t deterministic;
  int32_t reserved;
} anymask_backward_args;

typedef struct {
  int64_t pairs, visible_pairs, tiles, all_tiles, some_tiles;
} anymask_statistics;

ANYMASK_API const char* anymask_version(void);
ANYMASK_API const char* anymask_last_error(void);

/* A plan is for calls of its mask and problem, every size of them: tiles depend on them all. */
ANYMASK_API anymask_status anymask_plan_bytes(const anymask_mask* mask,
                                              const anymask_problem* problem, int64_t* bytes);
ANYMASK_API anymask_status anymask_build_plan(const anymask_mask* mask,
                                              const anymask_problem* problem, void* buffer,
                                              int64_t bytes, void* stream);
/* The same for forward calls alone, in less time. */
ANYMASK_API anymask_status anymask_build_forward_plan(const anymask_mask* mask,
                                                      const anymask_problem* problem, void* buffer,
                                                      int64_t bytes, void* stream);

/* Scratch memory of a CUDA call, 256-byte aligned (0 on the CPU). The backward pass's depends on
 * types and shapes of score options and their gradients; NULL: none. */
ANYMASK_API anymask_status anymask_forward_workspace_bytes(const anymask_mask* mask,
                                                           const anymask_problem* problem,
                                                           int64_t* bytes);
ANYMASK_API anymask_status anymask_backward_workspace_bytes(
    const anymask_mask* mask, const anymask_problem* problem, int32_t deterministic,
    const anymask_score_options* scores, const anymask_score_gradients* gradients, int64_t* bytes);

ANYMASK_API anymask_status anymask_attention_forward(const anymask_forward_args* args);
ANYMASK_API anymask_status anymask_attention_backward(const anymask_backward_args* args);

ANYMASK_API anymask_status anymask_mask_shape(const anymask_mask* mask,
                                              const anymask_problem* problem, int64_t* batches,
                                              int64_t* heads);
ANYMASK_API anymask_status anymask_mask_statistics(const anymask_mask* mask,
                                                   const anymask_problem* problem,
                                                   int64_t tile_rows, int64_t tile_columns,
                                                   anymask_statistics* statistics);
ANYMASK_API anymask_status anymask_mask_to_dense(const anymask_mask* mask,
                                                 const anymask_problem* problem,
                                                 const anymask_tensor* allowed);
ANYMASK_API anymask_status anymask_mask_tile_classes(const anymask_mask* mask,
                                                     const anymask_problem* problem,
                                                     int64_t tile_rows, int64_t tile_columns,
                                                     const anymask_tensor* classes);
ANYMASK_API anymask_status anymask_intervals_from_dense(const anymask_tensor* allowed,
                                                        int32_t causal,
                                                        const anymask_tensor* indices,
                                                        int32_t* columns);

ANYMASK_API anymask_status anymask_top_keys_workspace_bytes(const anymask_tensor* scores,
                                                            int64_t* bytes);
ANYMASK_API anymask_status anymask_top_keys(const anymask_tensor* scores, int64_t keep,
                                            int64_t q_len, const anymask_tensor* ends, void* stream,
                                            void* workspace, int64_t workspace_bytes);

/* CPU backend. Lists are written as comma-separated names into `names`. */
ANYMASK_API anymask_status anymask_cpu_instruction_sets(char* names, int64_t size);
ANYMASK_API anymask_status anymask_cpu_instruction_set(char* name, int64_t size);
ANYMASK_API anymask_status anymask_set_cpu_instruction_set(const char* name);
ANYMASK_API anymask_status anymask_set_cpu_threads(int32_t threads);
ANYMASK_API anymask_status anymask_cpu_threads(int32_t* threads);
ANYMASK_API anymask_status anymask_measure_cpu_peak(int32_t dtype, double* gflops);

/* CUDA backend: a report as JSON (*size: the room there is; afterwards the bytes it needs, with
 * ANYMASK_INVALID_VALUE when that is more), and kernels compiled ahead. */
ANYMASK_API anymask_status anymask_cuda_report(char* json, int64_t* size);
ANYMASK_API anymask_status anymask_warm_up_cuda(int32_t capability, int32_t* kernels);
ANYMASK_API anymask_status anymask_add_cuda_library_folder(const char* folder);
ANYMASK_API anymask_status anymask_set_cuda_package_cache(const char* folder);

#ifdef __cplusplus
}
#endif

#endif /* ANYMASK_ANYMASK_H_ */
